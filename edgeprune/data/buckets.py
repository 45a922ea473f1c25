"""Aspect-ratio buckets: a few sizes of about the same number of pixels, and the one that an image comes nearest to.

Only shapes and PIL's resizing. What it leaves out: more than one number of pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Size = tuple[int, int]
"""Height and width in pixels."""

RATIO = 2.0
"""The longest side in shorter ones; longer images are cropped to it."""
STEPS = 16
"""Sides go in steps of this part of a square's side, or in what the model needs if that is more."""
MOST_ENLARGED = 2.0
"""An image that must grow by more to fill its bucket is left out."""


def bucket_sizes(base: Size, unit: int, largest: int | None = None) -> list[Size]:
    """Sizes with at most the pixels of `base`, in steps of a multiple of `unit`, and `base` itself.

    Args:
        unit: pixels of a token's side: what a VAE's factor and a transformer's patch make together.
        largest: pixels of the longest side that the model has positions for; None for no limit.
    """
    area = base[0] * base[1]
    step = max(1, round(math.sqrt(area) / STEPS / unit)) * unit
    found = {base}
    for height in range(step, math.isqrt(area) + 1, step):  # and turned by a right angle
        width = area // height // step * step
        fits = largest is None or max(height, width) <= largest
        if fits and width and max(height, width) <= RATIO * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(image: Size, sizes: list[Size]) -> Size:
    """The size whose ratio of sides is the nearest to an image's, the first of equals."""
    ratio = math.log(image[0] / image[1])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def enlarged(image: Size, size: Size) -> float:
    """By how much an image's sides grow to fill a size."""
    return max(size[0] / image[0], size[1] / image[1])


def fitted(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """An image as (H, W, 3), resized and cropped to the middle."""
    return np.asarray(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))
