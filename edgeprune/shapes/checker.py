"""Read scenes of shapes world back from pixels alone, check them against a `Meaning`, and average results by task."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from edgeprune.common.intervals import Interval, mean_interval
from edgeprune.shapes.captions import COLOURS, GLYPHS, SHAPES, TASKS, Meaning, Thing
from edgeprune.shapes.renderer import BACKGROUND, SIZE, Pixels, ink_of, relation_of

_GRID = 20
_MASK_LEVEL = 60.0  # distance from the background, of 441, above which a pixel is ink
_MIN_AREA = 30  # pixels; the smallest true shape covers 70
_OUTLINE = 0.4  # coverage that marks a shape's edge
# Template error (with aspect) above which a thing has no known shape; the tables printed by the tests justify it.
_MAX_SHAPE_ERROR = 0.18
_MAX_COLOUR_ERROR = 75.0


@dataclass(frozen=True)
class Seen:
    """One object found in an image."""

    shape: str | None
    colour: str | None
    box: tuple[int, int, int, int]
    """y0, x0, y1, x1."""


def see(pixels: Pixels, *, glyphs: bool = False) -> list[Seen]:
    """Return the objects of an image: connected regions of ink, or all ink as one character if `glyphs`."""
    distance = np.linalg.norm(pixels.astype(np.float32) - np.asarray(BACKGROUND, np.float32), axis=-1)
    mask = distance > _MASK_LEVEL
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    keep = [i for i in range(1, count + 1) if areas[i] >= _MIN_AREA]
    groups = [np.isin(labels, keep)] if glyphs and keep else [labels == i for i in keep]
    return [_look(pixels, distance, group, GLYPHS if glyphs else SHAPES) for group in groups]


def _look(
    pixels: Pixels, distance: NDArray[np.float32], group: NDArray[np.bool_], names: str | tuple[str, ...]
) -> Seen:
    """Read box, colour and shape of one region of ink."""
    level = float(np.quantile(distance[group], 0.8))
    # The box follows the outline at partial coverage, so a soft edge does not widen it.
    ys, xs = np.nonzero(group & (distance > _OUTLINE * level))
    box = int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1
    core = pixels[group & (distance > 0.9 * level)].astype(np.float32)
    centre = np.median(core, axis=0)
    errors = {name: float(np.linalg.norm(centre - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    colour = min(errors, key=errors.__getitem__)
    window = np.s_[box[0] : box[2], box[1] : box[3]]
    soft = np.clip(distance[window] / level, 0, 1) * group[window]
    shape = _classify(soft.astype(np.float32), names)
    return Seen(shape, colour if errors[colour] <= _MAX_COLOUR_ERROR else None, box)


def _normalise(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Resize ink (h, w), cropped to its box, to (20, 20)."""
    grid = Image.fromarray(ink).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    return np.asarray(grid, dtype=np.float32)


@functools.cache
def _templates(names: str | tuple[str, ...]) -> list[tuple[str, float, NDArray[np.float32]]]:
    """Return name, aspect and normalised ink of every shape at several sizes."""
    extents = (34, 37, 40) if names == GLYPHS else (14, 17, 20, 24, 30)
    out = []
    for name, extent in itertools.product(names, extents):
        ink = ink_of(name, extent)
        mask = ink > _OUTLINE
        ys, xs = np.nonzero(mask)
        ink = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        out.append((name, ink.shape[1] / ink.shape[0], _normalise(np.ascontiguousarray(ink))))
    return out


def _classify(ink: NDArray[np.float32], names: str | tuple[str, ...]) -> str | None:
    """Return the name of the best template, or None if even that one fits badly."""
    grid, aspect = _normalise(np.ascontiguousarray(ink)), ink.shape[1] / ink.shape[0]
    errors = [
        (float(np.abs(grid - template).mean()) + 0.25 * abs(np.log(aspect / expected)), name)
        for name, expected, template in _templates(names)
    ]
    error, name = min(errors)
    return name if error <= _MAX_SHAPE_ERROR else None


def check(pixels: Pixels, meaning: Meaning) -> bool:
    """Return True if an image, (64, 64, 3) uint8, shows exactly what `meaning` asks for and nothing else."""
    seen = see(pixels, glyphs=meaning.task == "typography")
    if len(seen) != len(meaning.things):
        return False
    if any(
        all(_fits(s, t) for s, t in zip(order, meaning.things, strict=True)) for order in itertools.permutations(seen)
    ):
        return _placed(seen, meaning)
    return False


def _fits(seen: Seen, thing: Thing) -> bool:
    """Return True if an object has a thing's shape, colour and size."""
    extent = max(seen.box[2] - seen.box[0], seen.box[3] - seen.box[1])
    return (
        seen.shape == thing.shape
        and (seen.colour == thing.colour if thing.colour else seen.colour is not None)
        and (thing.size is None or (thing.size == "large") == (extent >= 22))
    )


def _placed(seen: list[Seen], meaning: Meaning) -> bool:
    """Return True if the objects stand where `meaning` asks for them."""
    if meaning.relation:
        first, second = (next(s for s in seen if s.shape == t.shape) for t in meaning.things)
        return relation_of(first.box, second.box, margin=0.0) == meaning.relation
    if meaning.place:
        y0, x0, y1, x1 = seen[0].box
        dy, dx = (y0 + y1 - SIZE) / 2, (x0 + x1 - SIZE) / 2
        near = 6.5
        row = "" if abs(dy) < near else "top" if dy < 0 else "bottom"
        column = "" if abs(dx) < near else "left" if dx < 0 else "right"
        return (f"{row} {column}".strip() or "middle") == meaning.place
    return True


def task_means(values: NDArray[np.float64], tasks: list[str]) -> dict[str, float]:
    """Average the per-prompt values by task, in the order of TASKS."""
    names = np.asarray(tasks)
    return {t: float(values[names == t].mean()) for t in TASKS if t in Counter(tasks)}


def score(values: NDArray[np.float64], tasks: list[str]) -> Interval:
    """Average over tasks, with a bootstrap 95 % interval over prompts within each task.

    Args:
        values: share of satisfied images per prompt, (P,).
        tasks: the task of each prompt.
    """
    return mean_interval(values, tasks)
