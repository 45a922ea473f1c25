"""Peak signal-to-noise ratio of images against the original's at equal prompts and seeds, in dB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.metrics import Images
from edgeprune.metrics.pairs import matched

MOST = 100.0
"""dB of equal images, whose ratio is infinite."""


def decibels(first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of two images (H, W, 3)."""
    error = float(np.square(first.astype(np.float64) - other).mean())
    return min(MOST, float(10 * np.log10(255**2 / max(error, 1e-12))))


def mean_decibels(first: Images, other: Images) -> float:
    """Mean over images."""
    return float(np.mean([decibels(a, b) for a, b in zip(first, other, strict=True)]))


class Psnr:
    """Needs no weights."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """dB per image.

        Raises:
            InputError: two images differ in size.
        """
        return [decibels(a, b) for a, b in matched(images, originals)]


METRIC = Psnr
