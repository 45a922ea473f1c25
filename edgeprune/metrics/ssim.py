"""SSIM, structural similarity to the original's images of the same prompts and seeds (Wang et al. 2004): 1 if equal.

Computed at one scale, per colour channel, with Gaussian windows of sigma 1.5. Windows that cross the border are left
out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.metrics import Images
from edgeprune.metrics.paired import matched

with needs("ssim"):
    from scipy.ndimage import gaussian_filter

SIGMA, RADIUS = 1.5, 5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the SSIM of two images (H, W, 3), whose sides have at least 11 pixels.

    Raises:
        InputError: the images are smaller than one window.
    """
    if min(first.shape[:2]) < 2 * RADIUS + 1:
        found = f"{first.shape[1]}x{first.shape[0]}"
        raise InputError(f"--metric ssim: found an image of {found}, expected at least {2 * RADIUS + 1} pixels a side")

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = slice(RADIUS, -RADIUS)
        out: NDArray[np.float64] = gaussian_filter(values, SIGMA, radius=RADIUS, axes=(0, 1))[inside, inside]
        return out

    a, b = first.astype(np.float64), other.astype(np.float64)
    ma, mb = mean(a), mean(b)
    va, vb, covariance = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    likeness = (2 * ma * mb + _C1) * (2 * covariance + _C2) / ((ma * ma + mb * mb + _C1) * (va + vb + _C2))
    return float(likeness.mean())


class Ssim:
    """SSIM; needs no weights."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return -1 to 1 per image.

        Raises:
            InputError: two images differ in size or are smaller than a window.
        """
        return [ssim(a, b) for a, b in matched(images, originals)]


METRIC = Ssim
