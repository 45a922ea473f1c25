"""95 % intervals over prompts: of a mean score, and of the drop between two paired scores. Needs only numpy.

One rule: a bootstrap over prompts whose percentiles are widened to the coverage of Student's t (T. Hesterberg, "What
Teachers Should Know about the Bootstrap", 2015, section 5.3). Plain percentiles are too narrow for few prompts: 90 %
coverage at 7. Scores may be bounded or 0 and 1, since percentiles stay among the values that means can take. With fewer
than 7 values, or two per task, resampled means do not lie far enough out, so there the interval is Student's t with the
bootstrap's standard error. One value has no interval: low and high are None. Contributions of parts, means of
differences that are added up, have Student's t alone (`half_width`). Equal values give an interval without width, which
says nothing about rare failures.

Prompts may belong to tasks. Then the statistic is the mean of the tasks' means, and prompts are resampled within each
task. If every task has a single prompt, prompts are resampled across all tasks, since resampling one prompt changes
nothing. Metrics with tasks count passed checks, so their scores are shares, and intervals stay within 0 and 1.

Several images of one prompt are not independent: average them first. Several training seeds are resampled too; this is
not widened for their small number. With one seed the interval is over prompts only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
MOST_ERRORS = 2.7
"""Percentiles serve up to this many standard errors of the bootstrap, that of 7 values; further out few draws lie."""
_NORMAL = NormalDist()
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's t with 1 to 10 degrees of freedom."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high`, where there is a single value."""
    high: float | None


class Drop(NamedTuple):
    """How far the second of two paired scores is below the first."""

    difference: Interval
    """The first score minus the second."""
    relative: Interval | None
    """The difference as a fraction of the first score's mean; None unless that mean is above 0."""


def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL.inv_cdf(0.975)  # Abramowitz and Stegun, 26.7.5
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def half_width(values: ArrayLike) -> float | None:
    """Return half the width of Student's 95 % interval of a mean of values (N); None for a single value."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return None
    return float(student_t(len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))


def excludes_zero(interval: Interval) -> bool:
    """Return whether the whole interval is above 0 or below 0; an unknown interval is not."""
    return interval.low is not None and interval.high is not None and (interval.low > 0 or interval.high < 0)


def _groups(tasks: Sequence[str] | None, count: int) -> list[NDArray[np.intp]]:
    names = np.asarray(tasks if tasks is not None else [""] * count)
    return [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]


def _drawn_within(groups: list[NDArray[np.intp]]) -> list[NDArray[np.intp]]:
    """Return the groups that prompts are resampled within: all prompts together where each group has one."""
    return groups if max(map(len, groups)) > 1 else [np.concatenate(groups)]


def _means(
    rows: Sequence[NDArray[np.float64]], groups: list[NDArray[np.intp]], draws: int, seed: int
) -> NDArray[np.float64]:
    """Return the mean over seeds and groups of each of K arrays (S, P), plain and for each draw: (K, 1 + draws).

    All K arrays share the resampled prompts, so their differences are paired. The S training seeds of each array are
    resampled independently.
    """
    rng = np.random.default_rng(seed)
    picks = [g[rng.integers(0, len(g), (draws, len(g)))] for g in _drawn_within(groups)]
    out = []
    for values in rows:
        plain = np.mean([values[:, g].mean() for g in groups])
        drawn = np.mean([values[:, pick].mean(-1) for pick in picks], axis=0)  # (S, draws)
        if len(values) > 1:
            seeds = rng.integers(0, len(values), (len(values), draws))
            drawn = np.take_along_axis(drawn, seeds, axis=0)
        out.append(np.concatenate([[plain], drawn.mean(0)]))
    return np.stack(out)


def _interval(
    means: NDArray[np.float64], groups: list[NDArray[np.intp]], least: float = -math.inf, most: float = math.inf
) -> Interval:
    """Return the interval of a mean from its value and its draws, (1 + draws), within what the mean can be."""
    mean, drawn = float(means[0]), means[1:]
    count = sum(map(len, groups))
    freedom = count - len(_drawn_within(groups))
    if freedom < 1:
        return Interval(mean, None, None)
    # A bootstrap's variance is that of the values over N instead of N - 1, so it is too small, by tasks all the more.
    errors = math.sqrt(count / freedom) * student_t(freedom)
    if errors > MOST_ERRORS:
        half = errors * float(drawn.std())
        return Interval(mean, max(least, mean - half), min(most, mean + half))
    tail = _NORMAL.cdf(-errors)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def mean_interval(
    values: ArrayLike, tasks: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the mean over tasks of the mean over prompts, with its interval.

    Args:
        values: one value per prompt, (P,); or for several training seeds (S, P), which are resampled as well.
        tasks: the task of each prompt, for shares of passed checks; None for other values.
        draws: the number of bootstrap resamples.
        seed: seeds the resampling.
    """
    scores = np.atleast_2d(np.asarray(values, dtype=float))
    groups = _groups(tasks, scores.shape[1])
    bounds = (-math.inf, math.inf) if tasks is None else (0.0, 1.0)
    return _interval(_means([scores], groups, draws, seed)[0], groups, *bounds)


def paired_drop(
    first: ArrayLike, second: ArrayLike, tasks: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Drop:
    """Return how far `second` is below `first`, prompt by prompt. The arguments are those of `mean_interval`."""
    scores = [np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second)]
    groups = _groups(tasks, scores[0].shape[1])
    a, b = _means(scores, groups, draws, seed)
    share = np.divide(a - b, a, out=np.zeros_like(a), where=a > 0)  # a draw without any success carries no information
    least, most = (-math.inf, math.inf) if tasks is None else (-1.0, 1.0)
    relative = _interval(share, groups, most=most) if a[0] > 0 else None
    return Drop(_interval(a - b, groups, least, most), relative)
