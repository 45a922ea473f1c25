"""Read scenes of the rich world from pixels: things in one colour or two, or words.

A thing's two colours are those between which its pixels lie: where two colours meet, pixels are mixtures of them, which
may look like a third colour of the palette. With the two known, each pixel is ink of one or the other; these two maps
are compared with every shape and texture at once.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from edgeprune.shapes import plain_reader
from edgeprune.shapes.figures import BACKGROUND, COLOURS, SHAPES, TEXTURES, Ink, Pixels, ink_of, texture_of
from edgeprune.shapes.reading import Mask, Seen, box_of, distance_from_background, eroded, normalised, regions

WORDS = ("SUN", "SKY", "CAT", "FOX", "BEE", "ICE", "MAP", "KEY", "TEA", "CUP", "BUS", "HEN")
_LETTERS = "".join(sorted(set("".join(WORDS))))
_GRID = 24
_MIN_AREA = 60  # pixels; the smallest true thing, a letter, covers 150
_OUTLINE = 0.4  # coverage that marks a thing's edge
_NAMES = tuple(COLOURS)
_PALETTE = np.asarray(list(COLOURS.values()), np.float32)
# Errors above which something is not what it is most like; the tables printed by the tests justify them.
_MAX_ERROR = 0.25
_MAX_COLOUR_ERROR = 60.0
# A second colour must make up this share of a thing's inner pixels, and explain them so much better.
_MIN_SHARE, _MIN_GAIN = 0.04, 8.0


def see(pixels: Pixels, *, glyphs: bool = False) -> list[Seen]:
    """Return the objects of an image: connected regions of ink, or words if `glyphs`."""
    groups = regions(distance_from_background(pixels), _MIN_AREA)
    return _words(pixels, groups) if glyphs else [_look(pixels, group) for group in groups]


def _look(pixels: Pixels, group: Mask) -> Seen:
    """Read box, colours, shape and texture of one region of ink."""
    inner = eroded(group, 2)
    core = pixels[inner if inner.sum() >= _MIN_AREA else group].astype(np.float32)
    colours, error = _colours(core)
    y0, x0, y1, x1 = box_of(group)
    crop = pixels[y0:y1, x0:x1].astype(np.float32)
    cover, second = _unmixed(crop, colours)
    cover, second = cover * group[y0:y1, x0:x1], second * group[y0:y1, x0:x1]
    # The box follows the outline at partial coverage, so a soft edge does not widen it.
    edge = cover > _OUTLINE
    if not edge.any():
        return Seen(None, None, (y0, x0, y1, x1))
    a, b, c, d = box_of(edge)
    cover, second, box = cover[a:c, b:d], second[a:c, b:d], (y0 + a, x0 + b, y0 + c, x0 + d)
    found = [(*_match(cover, second, textured=len(colours) > 1), colours)]
    if len(colours) > 1:
        found.append((*_match(cover, cover - second, textured=True), colours[::-1]))
    misfit, shape, texture, order = min(found)
    names = [_NAMES[i] for i in order] if error <= _MAX_COLOUR_ERROR else [None]
    if misfit > _MAX_ERROR:
        return Seen(None, names[0], box)
    return Seen(shape, names[0], box, texture or None, names[1] if len(names) > 1 else None)


def _colours(core: NDArray[np.float32]) -> tuple[tuple[int, ...], float]:
    """Return one or two colours of the palette, by index, and the mean distance of pixels from what they explain.

    Args:
        core: inner pixels of a thing, (n, 3).
    """
    alone = np.linalg.norm(core[:, None] - _PALETTE, axis=-1).clip(max=100).mean(0)
    best: tuple[tuple[int, ...], float] = (int(alone.argmin()),), float(alone.min())
    gain = _MIN_GAIN
    for a, b in itertools.combinations(range(len(_PALETTE)), 2):
        way = _PALETTE[b] - _PALETTE[a]
        at = ((core - _PALETTE[a]) @ way / (way @ way)).clip(0, 1)
        if min((at < 0.25).mean(), (at > 0.75).mean()) < _MIN_SHARE:
            continue
        error = float(np.linalg.norm(core - _PALETTE[a] - at[:, None] * way, axis=-1).clip(max=100).mean())
        if error + gain < best[1]:
            best, gain = ((a, b), error), 0.0
    return best


def _unmixed(crop: NDArray[np.float32], colours: tuple[int, ...]) -> tuple[Ink, Ink]:
    """Return how much of each pixel is ink, and how much is ink of the second colour: two of (h, w).

    Args:
        crop: pixels around a thing, (h, w, 3).
        colours: the thing's one or two colours.
    """
    ground = np.asarray(BACKGROUND, np.float32)
    covers, errors = [], []
    for colour in colours:  # a mixture with the background
        way = _PALETTE[colour] - ground
        cover = ((crop - ground) @ way / (way @ way)).clip(0, 1)
        covers.append(cover)
        errors.append(np.linalg.norm(crop - ground - cover[..., None] * way, axis=-1))
    if len(colours) == 1:
        return covers[0], np.zeros_like(covers[0])
    way = _PALETTE[colours[1]] - _PALETTE[colours[0]]
    at = ((crop - _PALETTE[colours[0]]) @ way / (way @ way)).clip(0, 1)
    errors.append(np.linalg.norm(crop - _PALETTE[colours[0]] - at[..., None] * way, axis=-1))
    choice = np.argmin(errors, axis=0)
    cover = np.choose(choice, [covers[0], covers[1], np.ones_like(at)])
    second = np.choose(choice, [np.zeros_like(at), covers[1], at])
    return cover, second


@functools.cache
def _templates() -> tuple[list[tuple[str, str]], NDArray[np.float32], NDArray[np.float32]]:
    """Return shape and texture ("" for none), aspects, and normalised maps (n, 2, grid, grid) at several sizes."""
    names, aspects, maps = [], [], []
    for shape, texture, extent in itertools.product(SHAPES, ("", *TEXTURES), (26, 34, 46, 60)):
        cover = ink_of(shape, extent)
        second = cover * texture_of(texture, extent) if texture else np.zeros_like(cover)
        y0, x0, y1, x1 = box_of(cover > _OUTLINE)
        names.append((shape, texture))
        aspects.append((x1 - x0) / (y1 - y0))
        maps.append([normalised(ink[y0:y1, x0:x1], _GRID) for ink in (cover, second)])
    return names, np.asarray(aspects, np.float32), np.asarray(maps, np.float32)


def _match(cover: Ink, second: Ink, *, textured: bool) -> tuple[float, str, str]:
    """Return error, shape and texture of the best template."""
    names, aspects, maps = _templates()
    grids = np.stack([normalised(ink, _GRID) for ink in (cover, second)])
    errors = np.abs(maps - grids).mean((2, 3)).sum(1) + 0.25 * np.abs(np.log(cover.shape[1] / cover.shape[0] / aspects))
    errors[[bool(texture) != textured for _, texture in names]] = np.inf
    best = int(errors.argmin())
    return float(errors[best]), *names[best]


def _words(pixels: Pixels, groups: list[Mask]) -> list[Seen]:
    """Read regions of ink as letters, and letters whose heights overlap as a word."""
    letters = sorted((_letter(pixels, group) for group in groups), key=lambda seen: seen.box[0] + seen.box[2])
    lines: list[list[Seen]] = []
    for letter in letters:
        if lines and letter.box[0] < (lines[-1][-1].box[0] + lines[-1][-1].box[2]) / 2:
            lines[-1].append(letter)
        else:
            lines.append([letter])
    return [_word(sorted(line, key=lambda seen: seen.box[1])) for line in lines]


def _letter(pixels: Pixels, group: Mask) -> Seen:
    """Read one letter, in one colour."""
    inner = eroded(group)
    (colour,), error = _one_colour(pixels[inner if inner.any() else group].astype(np.float32))
    y0, x0, y1, x1 = box_of(group)
    cover = _unmixed(pixels[y0:y1, x0:x1].astype(np.float32), (colour,))[0] * group[y0:y1, x0:x1]
    edge = cover > _OUTLINE
    if not edge.any():
        return Seen(None, None, (y0, x0, y1, x1))
    a, b, c, d = box_of(edge)
    shape = plain_reader.classify(cover[a:c, b:d], _LETTERS)
    name = _NAMES[colour] if error <= _MAX_COLOUR_ERROR else None
    return Seen(shape, name, (y0 + a, x0 + b, y0 + c, x0 + d))


def _one_colour(core: NDArray[np.float32]) -> tuple[tuple[int], float]:
    """Return the colour of the palette that is nearest to pixels (n, 3), and its distance."""
    errors = np.linalg.norm(np.median(core, axis=0) - _PALETTE, axis=-1)
    return (int(errors.argmin()),), float(errors.min())


def _word(letters: list[Seen]) -> Seen:
    """Join letters, from left to right; a word has a colour if all its letters have it."""
    shapes, colours = [letter.shape for letter in letters], {letter.colour for letter in letters}
    boxes = np.asarray([letter.box for letter in letters])
    box = *boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()
    word = None if None in shapes else "".join(map(str, shapes))
    return Seen(word, colours.pop() if len(colours) == 1 else None, box)
