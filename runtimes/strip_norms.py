"""Group norms of values that are never in memory whole: mean and variance are merged strip by strip.

Summing squares would lose everything where the mean is far from 0. Here each strip's squares are taken around its own
mean, and two strips are merged as Chan, Golub and LeVeque do ("Algorithms for computing the sample variance", 1983).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.runtimes.base import Array

Exact = NDArray[np.float64]
_AT_ONCE = 1 << 20
"""Bytes of a strip that are copied at one time."""


@dataclass(frozen=True)
class Norm:
    """The numbers of a group norm over C channels."""

    groups: int
    epsilon: float
    gamma: Array
    """Scale (C)."""
    beta: Array
    """Shift (C)."""


class Moments:
    """Mean and squared deviations of each channel of a value (C, rows, W), of which rows are added."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean: Exact = np.zeros(channels)
        self._squares: Exact = np.zeros(channels)

    def add(self, strip: Array) -> None:
        """Add rows: a strip (C, rows, W)."""
        count = strip[0].size
        mean, squares = np.empty(len(strip)), np.empty(len(strip))
        channels = max(1, _AT_ONCE // (4 * count))
        for first in range(0, len(strip), channels):
            part = slice(first, first + channels)
            values = strip[part].reshape(-1, count)
            middle = values.mean(axis=1, keepdims=True)
            apart = values - middle
            # The rounded middle is some number near the mean: what it is off by is corrected here.
            off = apart.mean(axis=1).astype(np.float64)
            mean[part] = middle[:, 0] + off
            squares[part] = np.einsum("cn,cn->c", apart, apart) - count * off**2
        total = self._count + count
        apart_means = mean - self._mean
        self._mean += apart_means * (count / total)
        self._squares += squares + apart_means**2 * (self._count * count / total)
        self._count = total

    def affine(self, norm: Norm) -> tuple[Array, Array]:
        """Return (a, b), (C) each, with which the norm of all rows is x * a + b."""
        means = self._mean.reshape(norm.groups, -1)
        mean = means.mean(axis=1, keepdims=True)
        between = self._count * (means - mean) ** 2
        variance = (self._squares.reshape(norm.groups, -1) + between).sum(axis=1, keepdims=True)
        variance /= self._count * means.shape[1]
        scale = norm.gamma.reshape(norm.groups, -1) / np.sqrt(variance + norm.epsilon)
        shift = norm.beta.reshape(norm.groups, -1) - mean * scale
        return scale.reshape(-1).astype(np.float32), shift.reshape(-1).astype(np.float32)
