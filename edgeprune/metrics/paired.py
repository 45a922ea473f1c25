"""Pairs of an image and the original model's image, for metrics that compare the two."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.metrics import Images


def matched(images: Images, originals: Images | None) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield pairs (image, original), both (H, W, 3).

    Raises:
        InputError: two images differ in size.
    """
    assert originals is not None, "KNOWN says that this metric is paired"
    for image, original in zip(images, originals, strict=True):
        if image.shape != original.shape:
            found, expected = (f"{i.shape[1]}x{i.shape[0]}" for i in (image, original))
            raise InputError(f"images: found one of {found}, expected {expected} as the original's of the same prompt")
        yield image, original
