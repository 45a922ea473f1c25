"""Bootstrap intervals over prompts: of a mean, and of what a paired score loses. Numpy alone.

Prompts may belong to tasks: then the figure is the mean of the tasks' means, and prompts are drawn anew within each;
among all of them where every task has but one, which drawn anew would always be itself.
What it leaves out: several images of one prompt, which are not independent (average them first), and tests of
significance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000


class Interval(NamedTuple):
    """A figure with its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float


class Drop(NamedTuple):
    """What the second of two paired scores has lost."""

    difference: Interval
    """First less second."""
    relative: Interval | None
    """The same as a share of the first's mean; None unless that is above 0."""


def _groups(tasks: Sequence[str] | None, count: int) -> list[NDArray[np.intp]]:
    names = np.asarray(tasks if tasks is not None else [""] * count)
    return [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]


def _means(
    rows: Sequence[NDArray[np.float64]], groups: list[NDArray[np.intp]], draws: int, seed: int
) -> NDArray[np.float64]:
    """Mean over seeds and groups of each of K arrays (S, P), as it is and for each draw: (K, 1 + draws).

    All share the drawn prompts, so that their differences are paired; the S training seeds of each are drawn apart.
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
    """Mean over tasks of the mean over prompts.

    Args:
        values: one per prompt, (P,); or of several training seeds, (S, P), which are drawn anew as prompts are.
        tasks: task of each prompt; None if there is one task.
        draws: how often the prompts are drawn anew.
        seed: of the draws.
    """
    given = np.atleast_2d(np.asarray(values, dtype=float))
    return _interval(_means([given], _groups(tasks, given.shape[1]), draws, seed)[0])


def paired_drop(
    first: ArrayLike, second: ArrayLike, tasks: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Drop:
    """How far `second` is below `first`, prompt by prompt; arguments as in `mean_interval`."""
    given = [np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second)]
    a, b = _means(given, _groups(tasks, given[0].shape[1]), draws, seed)
    share = np.divide(a - b, a, out=np.zeros_like(a), where=a > 0)  # a draw without any success tells nothing
    return Drop(_interval(a - b), _interval(share) if a[0] > 0 else None)
