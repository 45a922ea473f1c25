"""PSNR, the peak signal-to-noise ratio, of images and the original's images of the same prompts and seeds, in dB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.metrics import Images
from edgeprune.metrics.paired import matched

MOST = 100.0
"""The value in dB for equal images, whose ratio is infinite."""


def decibels(first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the PSNR of two images (H, W, 3)."""
    error = float(np.square(first.astype(np.float64) - other).mean())
    return min(MOST, float(10 * np.log10(255**2 / max(error, 1e-12))))


def mean_decibels(first: Images, other: Images) -> float:
    """Return the mean PSNR over pairs of images."""
    return float(np.mean([decibels(a, b) for a, b in zip(first, other, strict=True)]))


class Psnr:
    """PSNR; needs no weights."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return one value in dB per image.

        Raises:
            InputError: two images differ in size.
        """
        return [decibels(a, b) for a, b in matched(images, originals)]


METRIC = Psnr
