"""Bootstrap intervals over prompts: of a mean score, and of the drop between two paired scores. Needs only numpy.

Prompts may belong to tasks. Then the statistic is the mean of the tasks' means, and prompts are resampled within each
task. If every task has a single prompt, prompts are resampled across all tasks, since resampling one prompt changes
nothing. Several images of one prompt are not independent: average them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Drop(NamedTuple):
    """How far the second of two paired scores is below the first."""

    difference: Interval
    """The first score minus the second."""
    relative: Interval | None
    """The difference as a fraction of the first score's mean; None unless that mean is above 0."""


def _groups(tasks: Sequence[str] | None, count: int) -> list[NDArray[np.intp]]:
    names = np.asarray(tasks if tasks is not None else [""] * count)
    return [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]


def _means(
    rows: Sequence[NDArray[np.float64]], groups: list[NDArray[np.intp]], draws: int, seed: int
) -> NDArray[np.float64]:
    """Return the mean over seeds and groups of each of K arrays (S, P), plain and for each draw: (K, 1 + draws).

    All K arrays share the resampled prompts, so their differences are paired. The S training seeds of each array are
    resampled independently.
    """
    rng = np.random.default_rng(seed)
    drawn_within = groups if max(map(len, groups)) > 1 else [np.concatenate(groups)]
    picks = [g[rng.integers(0, len(g), (draws, len(g)))] for g in drawn_within]
    out = []
    for values in rows:
        plain = np.mean([values[:, g].mean() for g in groups])
        drawn = np.mean([values[:, pick].mean(-1) for pick in picks], axis=0)  # (S, draws)
        if len(values) > 1:
            seeds = rng.integers(0, len(values), (len(values), draws))
            drawn = np.take_along_axis(drawn, seeds, axis=0)
        out.append(np.concatenate([[plain], drawn.mean(0)]))
    return np.stack(out)


def _interval(means: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(means[1:], [0.025, 0.975])
    return Interval(float(means[0]), float(low), float(high))


def mean_interval(
    values: ArrayLike, tasks: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the mean over tasks of the mean over prompts, with its interval.

    Args:
        values: one value per prompt, (P,); or for several training seeds (S, P), which are resampled as well.
        tasks: the task of each prompt; None if there is only one task.
        draws: the number of bootstrap resamples.
        seed: seeds the resampling.
    """
    scores = np.atleast_2d(np.asarray(values, dtype=float))
    return _interval(_means([scores], _groups(tasks, scores.shape[1]), draws, seed)[0])


def paired_drop(
    first: ArrayLike, second: ArrayLike, tasks: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Drop:
    """Return how far `second` is below `first`, prompt by prompt. The arguments are those of `mean_interval`."""
    scores = [np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second)]
    a, b = _means(scores, _groups(tasks, scores[0].shape[1]), draws, seed)
    share = np.divide(a - b, a, out=np.zeros_like(a), where=a > 0)  # a draw without any success carries no information
    return Drop(_interval(a - b), _interval(share) if a[0] > 0 else None)
