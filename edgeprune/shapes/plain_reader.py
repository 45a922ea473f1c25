"""Read scenes of the plain world from pixels: plain shapes, or one character."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from edgeprune.shapes.figures import COLOURS, SHAPES, Ink, Pixels, glyph_of, ink_of
from edgeprune.shapes.reading import Mask, Seen, box_of, distance_from_background, normalised, regions

GLYPHS = "ACEHKLMRTX234579"
_GRID = 20
_MIN_AREA = 30  # pixels; the smallest true shape covers 70
_OUTLINE = 0.4  # coverage that marks a shape's edge
# Template error (with aspect) above which a thing has no known shape; the tables printed by the tests justify it.
_MAX_SHAPE_ERROR = 0.18
_MAX_COLOUR_ERROR = 75.0


def see(pixels: Pixels, *, glyphs: bool = False) -> list[Seen]:
    """Return the objects of an image: connected regions of ink, or all ink as one character if `glyphs`."""
    distance = distance_from_background(pixels)
    groups = regions(distance, _MIN_AREA)
    if glyphs and groups:
        groups = [np.any(groups, axis=0)]
    return [_look(pixels, distance, group, GLYPHS if glyphs else SHAPES) for group in groups]


def _look(pixels: Pixels, distance: Ink, group: Mask, names: str | tuple[str, ...]) -> Seen:
    """Read box, colour and shape of one region of ink."""
    level = float(np.quantile(distance[group], 0.8))
    # The box follows the outline at partial coverage, so a soft edge does not widen it.
    box = box_of(group & (distance > _OUTLINE * level))
    core = pixels[group & (distance > 0.9 * level)].astype(np.float32)
    centre = np.median(core, axis=0)
    errors = {name: float(np.linalg.norm(centre - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    colour = min(errors, key=errors.__getitem__)
    window = np.s_[box[0] : box[2], box[1] : box[3]]
    soft = np.clip(distance[window] / level, 0, 1) * group[window]
    shape = classify(soft.astype(np.float32), names)
    return Seen(shape, colour if errors[colour] <= _MAX_COLOUR_ERROR else None, box)


@functools.cache
def _templates(names: str | tuple[str, ...]) -> list[tuple[str, float, Ink]]:
    """Return name, aspect and normalised ink of every shape at several sizes."""
    extents = (14, 17, 20, 24, 30) if names == SHAPES else (34, 37, 40)
    out = []
    for name, extent in itertools.product(names, extents):
        ink = ink_of(name, extent) if names == SHAPES else glyph_of(name, extent)
        y0, x0, y1, x1 = box_of(ink > _OUTLINE)
        ink = ink[y0:y1, x0:x1]
        out.append((name, ink.shape[1] / ink.shape[0], normalised(ink, _GRID)))
    return out


def classify(ink: Ink, names: str | tuple[str, ...]) -> str | None:
    """Return the name of the best template, or None if even that one fits badly.

    Args:
        ink: of a thing, cropped to its box, (h, w).
        names: SHAPES, or characters.
    """
    grid, aspect = normalised(ink, _GRID), ink.shape[1] / ink.shape[0]
    errors = [
        (float(np.abs(grid - template).mean()) + 0.25 * abs(np.log(aspect / expected)), name)
        for name, expected, template in _templates(names)
    ]
    error, name = min(errors)
    return name if error <= _MAX_SHAPE_ERROR else None
