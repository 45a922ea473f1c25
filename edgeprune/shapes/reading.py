"""What both readers share: regions of ink, and the comparison of a region's ink with that of known figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.shapes.figures import BACKGROUND, Ink, Pixels
from edgeprune.shapes.layout import Box

_MASK_LEVEL = 60.0  # distance from the background, of 441, above which a pixel is ink

Mask = NDArray[np.bool_]
"""Some pixels of an image: (size, size)."""


@dataclass(frozen=True)
class Seen:
    """One object found in an image."""

    shape: str | None
    """The name of a shape, a character or a word; None if it is like none."""
    colour: str | None
    """None if it is none of the palette."""
    box: Box
    texture: str | None = None
    second: str | None = None
    """The other colour of a texture."""


def distance_from_background(pixels: Pixels) -> Ink:
    """Return the distance of every colour from the background's, of 441: (size, size)."""
    distance: Ink = np.linalg.norm(pixels.astype(np.float32) - np.asarray(BACKGROUND, np.float32), axis=-1)
    return distance


def regions(distance: Ink, least: int) -> list[Mask]:
    """Return the connected regions of ink of at least so many pixels."""
    from scipy import ndimage  # takes half a second, and most commands judge no image

    labels, count = ndimage.label(distance > _MASK_LEVEL, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if areas[i] >= least]


def eroded(mask: Mask, times: int = 1) -> Mask:
    """Return a mask without its outermost pixels, so many times."""
    from scipy import ndimage

    inner: Mask = ndimage.binary_erosion(mask, iterations=times)
    return inner


def box_of(mask: Mask) -> Box:
    """Return the smallest box around a mask."""
    ys, xs = np.nonzero(mask)
    return int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1


def normalised(ink: Ink, grid: int) -> Ink:
    """Resize ink (h, w), cropped to its box, to (grid, grid)."""
    image = Image.fromarray(np.ascontiguousarray(ink)).resize((grid, grid), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)
