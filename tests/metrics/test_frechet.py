"""The Fréchet distance of two sets of features."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.common.errors import InputError
from edgeprune.metrics import frechet


def normal(count: int, seed: int) -> frechet.Features:
    return np.random.default_rng(seed).standard_normal((count, 3))


def test_it_is_that_of_normals_with_these_means_and_covariances() -> None:
    one = normal(50, 0)
    assert frechet.distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(one, one + [3, 0, 4]) == pytest.approx(25)
    # Of one times c, covariances commute: tr(S + c c S - 2 c S) = (c - 1)^2 tr S, beside the means.
    trace, mean = np.trace(np.cov(one, rowvar=False)), one.mean(0)
    assert frechet.distance(one, 3 * one) == pytest.approx(4 * trace + 4 * mean @ mean)
    # Of diagonal covariances it is the sum over axes.
    scaled = one * [1, 2, 5]
    across = normal(80, 1)
    assert frechet.distance(scaled, across) == pytest.approx(frechet.distance(across, scaled))
    with pytest.raises(InputError, match="found 1 images, expected at least 2"):
        frechet.distance(one[:1], one)


def test_the_square_root_is_of_the_product() -> None:
    """Covariances that do not commute: compared with the eigenvalues of their product."""
    one, other = normal(40, 2) @ normal(3, 3), normal(60, 4) @ normal(3, 5)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    shared = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * shared
    assert frechet.distance(one, other) == pytest.approx(expected)


def test_the_interval_holds_the_distance_and_shrinks() -> None:
    collection, tasks = normal(3000, 6), ["a", "b"] * 1000
    few, many = (frechet.interval(normal(count, 7) + 0.5, collection, tasks[:count]) for count in (100, 2000))
    for found in (few, many):
        assert found.low is not None and found.high is not None
        assert found.low <= found.mean <= found.high
    (low, high), (least, most) = ((found.low or 0.0, found.high or 0.0) for found in (few, many))
    assert most - least < 0.5 * (high - low) and least < 0.75 < most
    assert frechet.interval(normal(100, 7), collection, tasks[:100]) == frechet.interval(
        normal(100, 7), collection, tasks[:100]
    )
