"""Aspect-ratio buckets: a few image sizes of about the same number of pixels, and the size that fits an image best."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Size = tuple[int, int]
"""Height and width in pixels."""

RATIO = 2.0
"""The highest ratio of the longer side to the shorter; more elongated images are cropped."""
STEPS = 16
"""Sides are multiples of this fraction of a square's side, or of the model's unit if that is larger."""
MOST_ENLARGED = 2.0
"""An image that must grow by a higher factor to fill its bucket is skipped."""


def bucket_sizes(base: Size, unit: int, largest: int | None = None) -> list[Size]:
    """Return `base` and sizes with at most as many pixels, whose sides are multiples of `unit`.

    Args:
        unit: the side of a token in pixels: the VAE's factor times the transformer's patch size.
        largest: the longest side in pixels that the model has positions for; None for no limit.
    """
    area = base[0] * base[1]
    step = max(1, round(math.sqrt(area) / STEPS / unit)) * unit
    sizes = {base}
    for height in range(step, math.isqrt(area) + 1, step):  # each size is added in both orientations
        width = area // height // step * step
        fits = largest is None or max(height, width) <= largest
        if fits and width and max(height, width) <= RATIO * min(height, width):
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest(image: Size, sizes: list[Size]) -> Size:
    """Return the size whose aspect ratio is nearest to an image's; the first one if several are equally near."""
    ratio = math.log(image[0] / image[1])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def enlarged(image: Size, size: Size) -> float:
    """Return the factor by which an image's sides grow to fill a size."""
    return max(size[0] / image[0], size[1] / image[1])


def fitted(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """Return an image resized and centre-cropped to a size, as (H, W, 3)."""
    return np.asarray(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))
