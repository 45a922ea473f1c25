"""The formulas of a user study, with known answers."""

from __future__ import annotations

import numpy as np
import pytest


def test_krippendorffs_own_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, missing values; interval alpha 0.849."""
    pytest.importorskip("scipy")
    from edgeprune.user_study.statistics import Ratings, alpha

    lines = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    cells = [(float(v), r, u) for r, line in enumerate(lines) for u, v in enumerate(line.split()) if v != "."]
    value, rater, unit = (np.asarray(column) for column in zip(*cells, strict=True))
    found = alpha(Ratings(value, rater, unit, np.zeros(len(value), int), 1))
    assert found == pytest.approx(0.849, abs=5e-4)
    same = Ratings(np.full(4, 3.0), np.arange(4), np.zeros(4, int), np.zeros(4, int), 1)
    assert alpha(same) is None


def test_paired_test_and_holm() -> None:
    pytest.importorskip("scipy")
    from edgeprune.user_study.statistics import holm, paired_test

    assert paired_test(np.ones(5)) == 2 / 2**5  # all signs alike: two of 32
    assert paired_test(np.array([1.0, -1.0, np.nan])) == 1
    assert paired_test(np.array([1.0, np.nan])) is None
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratings with effects of raters, prompts and both, a mean of 3: about 95 of 100 intervals contain it."""
    pytest.importorskip("scipy")
    from edgeprune.user_study import statistics

    rng, inside = np.random.default_rng(1), 0
    rater, prompt = (grid.ravel() for grid in np.indices((15, 20)))
    zero = np.zeros(len(rater), int)
    monkeypatch.setattr(statistics, "DRAWS", 200)
    for _ in range(40):
        effects = rng.normal(0, 0.5, 15)[rater] + rng.normal(0, 0.5, 20)[prompt] + rng.normal(0, 0.7, len(rater))
        ratings = statistics.Ratings(3 + effects, rater, prompt, zero, 1)
        low, high = statistics.interval(statistics.bootstrap(ratings))
        inside += bool(low[0] <= 3 <= high[0])
    assert inside >= 33  # of 40; below it by chance once in a thousand times
