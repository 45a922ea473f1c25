"""The Fréchet distance of two sets of features, as if each were normal (D. Dowson, B. Landau, 1982; "FID" of images).

    |m - n|^2 + tr(S + T - 2 (S T)^(1/2))    of means m, n and covariances S, T

Unlike LPIPS and PSNR it needs no image to be compared with: it asks whether images look like those of a collection, not
whether one is close to another. It is biased upwards for few images, so compare only sets of equal sizes.

Notation: N images, D features. Needs only numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.intervals import Interval

Features = NDArray[np.float64]
_DRAWS = 200


def distance(one: Features, other: Features) -> float:
    """Return the distance of two sets of features, (N, D) and (M, D); 0 for equal means and covariances.

    Raises:
        InputError: a set has fewer than two images.
    """
    for features in (one, other):
        if len(features) < 2:
            raise InputError(f"Fréchet distance: found {len(features)} images, expected at least 2")
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = _root(first)
    # The trace of (S T)^(1/2) is that of the symmetric (R T R)^(1/2), where R R = S.
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    apart = np.square(one.mean(0) - other.mean(0)).sum()
    return float(max(0.0, apart + np.trace(first) + np.trace(second) - 2 * shared))


def interval(one: Features, other: Features, groups: Sequence[str], seed: int = 0) -> Interval:
    """Return the distance with a 95 % bootstrap interval over images, which are resampled within their groups.

    Args:
        one: features (N, D) of the images that are judged.
        other: features (M, D) of the collection, which is not resampled.
        groups: the group of each image that is judged, such as its task.
        seed: of the bootstrap.
    """
    rng, names = np.random.default_rng(seed), np.asarray(groups)
    places = [np.flatnonzero(names == name) for name in dict.fromkeys(groups)]
    found = distance(one, other)
    drawn = [
        distance(one[np.concatenate([rng.choice(place, len(place)) for place in places])], other) for _ in range(_DRAWS)
    ]
    # Resampled sets repeat images, which adds to the distance: the interval is shifted back to the distance itself.
    low, high = np.percentile(np.asarray(drawn) - np.median(drawn), [2.5, 97.5])
    return Interval(found, max(0.0, found + float(low)), found + float(high))


def _root(matrix: Features) -> Features:
    """Return the symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(np.atleast_2d(matrix))
    root: Features = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
