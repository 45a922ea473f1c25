"""Means, intervals, paired tests and agreement over ratings that cross raters with prompts.

Ratings are rows: value (N), rater (N), prompt (N), condition (N), the last three as indices from 0. Raters are not
modelled one by one, as ITU-T P.913 does with bias and inconsistency.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DRAWS = 2000
_RESAMPLES = 9999
_SEED = 0


@dataclass(frozen=True)
class Ratings:
    """The answers to one question."""

    value: Floats
    rater: Ints
    prompt: Ints
    condition: Ints
    conditions: int

    def means(self, weight: Floats | None = None) -> Floats:
        """Return the mean of each condition (C), NaN where it has no rating; `weight` (N) repeats rows."""
        weight = np.ones(len(self.value)) if weight is None else weight
        total = np.bincount(self.condition, weight, self.conditions)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.bincount(self.condition, weight * self.value, self.conditions) / total)

    def of(self, unit: Ints) -> Floats:
        """Return the mean of each unit (rater or prompt) and condition: (U, C), NaN where there is no rating."""
        count = int(unit.max(initial=-1)) + 1
        cell = unit * self.conditions + self.condition
        total = np.bincount(cell, minlength=count * self.conditions)
        with np.errstate(invalid="ignore"):
            return np.asarray((np.bincount(cell, self.value, count * self.conditions) / total).reshape(count, -1))


def bootstrap(ratings: Ratings) -> Floats:
    """Return the conditions' means in D draws: (D, C), NaN where a draw has no rating of a condition.

    Resamples raters and prompts independently; a rating counts as often as its rater times its prompt was drawn. So the
    intervals hold for other people and other prompts. Source: A. Owen, "The pigeonhole bootstrap", 2007.
    """
    rng = np.random.default_rng(_SEED)
    units = [np.unique(unit, return_inverse=True)[1] for unit in (ratings.rater, ratings.prompt)]
    draws = np.empty((DRAWS, ratings.conditions))
    for draw in draws:
        weight = np.ones(len(ratings.value))
        for unit in units:
            count = int(unit.max()) + 1
            weight *= np.bincount(rng.integers(0, count, count), minlength=count)[unit]
        draw[:] = ratings.means(weight)
    return draws


def sampled(ratings: Ratings) -> list[bool]:
    """Return for each condition whether it has more than one rater or prompt: one answer has no interval."""
    counts = [(~np.isnan(ratings.of(unit))).sum(axis=0) for unit in (ratings.rater, ratings.prompt)]
    return [bool(most > 1) for most in np.maximum(*counts)]


def interval(draws: Floats) -> tuple[Floats, Floats]:
    """Return the 95 % interval, low and high (C), of values from draws (D, C)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a condition without ratings stays NaN
        low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    return low, high


def paired_test(difference: Floats) -> float | None:
    """Return the two-sided p of a mean difference of 0, by flipping signs.

    Exact for up to 13 pairs, else by 9999 random flips. Ignores NaN, a unit that lacks one of the two. None where fewer
    than two units remain.
    """
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return None
    test = permutation_test(
        (difference,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        random_state=_SEED,
    )
    return float(test.pvalue)


def holm(p: list[float | None]) -> list[float | None]:
    """Apply Holm's correction for several tests; None stays None and does not count. Source: S. Holm, 1979."""
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    out, highest = list(p), 0.0
    for rank, (value, i) in enumerate(order):
        out[i] = highest = max(highest, min(1.0, value * (len(order) - rank)))
    return out


def alpha(ratings: Ratings) -> float | None:
    """Return Krippendorff's alpha, interval metric, over images (prompt and condition) that at least two raters saw.

    1 is full agreement, 0 is chance; None where no image has two ratings, or all ratings are equal. Source:
    K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011. With squared differences its coincidence matrix
    reduces to variances: that of each image, weighted by its number of ratings, over that of all ratings.
    """
    image = ratings.prompt * ratings.conditions + ratings.condition
    count = np.bincount(image)
    kept = count[image] > 1
    value, image = ratings.value[kept], image[kept]
    if not len(value) or np.ptp(value) == 0:
        return None
    number = np.maximum(np.bincount(image, minlength=len(count)), 1)
    mean = np.bincount(image, value, len(count)) / number
    observed = np.mean((value - mean[image]) ** 2 * number[image] / (number[image] - 1))
    return float(1 - observed / np.var(value, ddof=1))
