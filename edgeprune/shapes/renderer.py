"""Draw scenes of shapes world: 64 x 64 pixels, at random places and sizes that satisfy a `Meaning`.

Things never rotate or overlap, and backgrounds are plain.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.shapes.captions import COLOURS, GLYPHS, SHAPES, TASKS, Meaning, Thing, prompts_of

SIZE = 64
BACKGROUND = (238, 238, 238)

Pixels = NDArray[np.uint8]
"""One image: (64, 64, 3), RGB."""

_OVERSAMPLE = 8


def _coverage(image: Image.Image) -> NDArray[np.float32]:
    """Return a grey image as ink in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


@functools.cache
def _glyph(char: str) -> NDArray[np.float32]:
    """Draw a large character as ink in [0, 1], cropped to its box."""
    font = ImageFont.load_default(size=256)
    image = Image.new("L", (400, 400), 0)
    ImageDraw.Draw(image).text((80, 40), char, fill=255, font=font, stroke_width=10)
    box = image.getbbox()
    assert box is not None
    return _coverage(image.crop(box))


@functools.cache
def ink_of(shape: str, extent: int) -> NDArray[np.float32]:
    """Draw a shape whose longer side is `extent` pixels, as ink in [0, 1]: (h, w).

    Raises:
        InputError: there is no such shape.
    """
    if shape in GLYPHS:
        ink = Image.fromarray((_glyph(shape) * 255).astype(np.uint8))
        width = max(1, round(extent * ink.width / ink.height))
        return _coverage(ink.resize((width, extent), Image.Resampling.BOX))
    n = extent * _OVERSAMPLE
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if shape == "ring":
            draw.ellipse((n * 0.25, n * 0.25, n * 0.75, n * 0.75), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, n, n), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n, n), (0, n)], fill=255)
    elif shape == "cross":
        draw.rectangle((n * 0.33, 0, n * 0.67, n), fill=255)
        draw.rectangle((0, n * 0.33, n, n * 0.67), fill=255)
    elif shape == "star":
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21) * n
        # The upper point touches the box; a five-pointed star is slightly wider than tall.
        points = np.stack([n / 2 + radius * np.cos(turn), n / 2 + radius * np.sin(turn)], 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        raise InputError(f"shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    small = image.resize((extent, extent), Image.Resampling.BOX)
    return _coverage(small)


def render(meaning: Meaning, rng: np.random.Generator) -> Pixels:
    """Draw one random scene that satisfies `meaning`: (64, 64, 3)."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUND
    inks = [ink_of(t.shape, _extent(meaning, t, rng)) for t in meaning.things]
    corners = _layout(meaning, [ink.shape for ink in inks], rng)
    for thing, ink, (y, x) in zip(meaning.things, inks, corners, strict=True):
        colour = COLOURS[thing.colour or str(rng.choice(list(COLOURS)))]
        h, w = ink.shape
        patch = canvas[y : y + h, x : x + w]
        patch += ink[..., None] * (np.asarray(colour, np.float32) - patch)
    return canvas.round().astype(np.uint8)


def _extent(meaning: Meaning, thing: Thing, rng: np.random.Generator) -> int:
    """Draw the longer side of a thing in pixels."""
    low, high = {
        "single_object": (14, 17) if thing.size == "small" else (28, 32),
        "counting": (16, 20) if len(meaning.things) > 2 else (16, 24),
        "colors": (20, 34),
        "typography": (34, 40),
    }.get(meaning.task, (18, 25))
    return int(rng.integers(low, high + 1))


def _layout(meaning: Meaning, boxes: list[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw top-left corners (y, x) that keep boxes 2 pixels from the edge and 4 from one another."""
    centres = _centres(meaning) or [None] * len(boxes)
    while True:
        corners = [_corner(meaning, box, centre, rng) for box, centre in zip(boxes, centres, strict=True)]
        rows = [(y, x, y + h, x + w) for (y, x), (h, w) in zip(corners, boxes, strict=True)]
        apart = all(
            a[2] + 4 <= b[0] or b[2] + 4 <= a[0] or a[3] + 4 <= b[1] or b[3] + 4 <= a[1]
            for a, b in itertools.combinations(rows, 2)
        )
        if apart and (meaning.relation is None or relation_of(rows[0], rows[1]) == meaning.relation):
            return corners


_NEAR, _MIDDLE, _FAR = 17, 32, 47
_PAIRS = {
    "to the left of": ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
    "to the right of": ((_MIDDLE, _FAR), (_MIDDLE, _NEAR)),
    "above": ((_NEAR, _MIDDLE), (_FAR, _MIDDLE)),
    "below": ((_FAR, _MIDDLE), (_NEAR, _MIDDLE)),
}
"""Centres (y, x) of two things by their relation."""


def _centres(meaning: Meaning) -> tuple[tuple[int, int], ...] | None:
    """Return the centres of several things before random jitter; without a relation, left to right as named.

    If two things could be anywhere, a small model would draw two of one kind instead of one of each: noise alone would
    decide which thing is where.
    """
    if len(meaning.things) == 2:
        return _PAIRS[meaning.relation or "to the left of"]
    corners = (_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _NEAR), (_FAR, _FAR)
    return {3: (*corners[:2], (_FAR, _MIDDLE)), 4: corners}.get(len(meaning.things))


def _corner(
    meaning: Meaning, box: tuple[int, ...], centre: tuple[int, int] | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Draw one box's top-left corner (y, x): near its centre, anywhere, or at the meaning's place."""
    h, w = box
    if centre is not None:
        y, x = (int(c) - side // 2 + int(rng.integers(-3, 4)) for c, side in zip(centre, box, strict=True))
        return min(max(y, 2), SIZE - h - 2), min(max(x, 2), SIZE - w - 2)
    if meaning.place is None and meaning.task != "typography":
        return int(rng.integers(2, SIZE - h - 1)), int(rng.integers(2, SIZE - w - 1))
    jitter = rng.integers(0, 4, size=2)
    place = meaning.place or "middle"
    middle_y, middle_x = (SIZE - h) // 2 + jitter[0] - 2, (SIZE - w) // 2 + jitter[1] - 2
    y = 2 + jitter[0] if "top" in place else SIZE - h - 2 - jitter[0] if "bottom" in place else middle_y
    x = 2 + jitter[1] if "left" in place else SIZE - w - 2 - jitter[1] if "right" in place else middle_x
    return int(y), int(x)


def relation_of(a: tuple[int, ...], b: tuple[int, ...], margin: float = 4.0) -> str | None:
    """Return where box a is relative to box b; None if neither axis clearly dominates."""
    dy, dx = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) > abs(dy) + margin:
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) > abs(dx) + margin:
        return "above" if dy < 0 else "below"
    return None


# Tasks that are hard to learn weigh more: which thing is where, and which colour belongs to which thing.
_TRAINING_WEIGHTS = {
    "single_object": 0.7,
    "two_objects": 1.5,
    "counting": 3.0,
    "colors": 0.7,
    "position": 3.0,
    "color_attribution": 3.0,
    "typography": 1.0,
}


SEEN = tuple(split for split in Split if split is not Split.HELD_OUT)
"""The splits that the built-in model was trained on."""


def training_scenes(
    count: int, seed: int, splits: Sequence[Split] = (Split.TRAINING,)
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return scenes (count, 64, 64, 3) and their plain captions, whose meanings are of these splits."""
    rng = np.random.default_rng(seed)
    pools = [prompts_of(task, *splits) for task in TASKS]
    weights = np.asarray([_TRAINING_WEIGHTS[t] for t in TASKS])
    tasks = rng.choice(len(pools), size=count, p=weights / weights.sum())
    picked = [pools[t][rng.integers(len(pools[t]))] for t in tasks]
    return np.stack([render(p.meaning, rng) for p in picked]), [p.text for p in picked]
