"""Intervals: known answers, coverage of small samples, pairing, tasks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgeprune.common.intervals import Interval, excludes_zero, half_width, mean_interval, paired_drop, student_t
from edgeprune.common.tables import interval_text


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 8)
    assert mean_interval(np.ones(4)) == (1, 1, 1)


@pytest.mark.parametrize("count", [2, 4, 7, 14])
def test_small_samples_are_covered(count: int) -> None:
    """Of 1000 samples of normal values, about 950 intervals contain the mean; with 14, two in each of seven tasks."""
    rng = np.random.default_rng(count)
    samples = rng.normal(0.5, 0.1, (1000, count))
    tasks = [str(i // 2) for i in range(count)] if count == 14 else None
    percentiles = [mean_interval(s, tasks, draws=1000, seed=i) for i, s in enumerate(samples)]
    assert 0.92 < np.mean([(i.low or 9) <= 0.5 <= (i.high or 0) for i in percentiles]) < 0.98
    widths = np.array([half_width(s) for s in samples])
    assert 0.92 < np.mean(abs(samples.mean(1) - 0.5) <= widths) < 0.98


def test_one_value_has_no_interval() -> None:
    assert half_width([1.0]) is None and mean_interval([0.5]) == (0.5, None, None)
    assert mean_interval([[0.5], [0.7]], ["a"]) == (0.6, None, None)
    drop = paired_drop([1.0], [0.5])
    assert drop.difference == (0.5, None, None) and drop.relative == (0.5, None, None)
    assert interval_text(mean_interval([0.5])) == "0.500 (n = 1)"
    assert not excludes_zero(drop.difference) and not excludes_zero(Interval(1, -1, 3))
    assert excludes_zero(Interval(1, 0.5, 2)) and excludes_zero(Interval(-1, -2, -0.5))


def test_student_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 200):
        assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_tasks_weigh_alike_and_are_drawn_within() -> None:
    values, tasks = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert mean_interval(values).mean == 0.75
    assert mean_interval(values, tasks) == (0.5, 0.5, 0.5)  # drawing within a task changes neither mean


def test_pairs_take_the_prompts_own_difficulty_out() -> None:
    easy = np.random.default_rng(2).uniform(0, 100, 200)
    found = paired_drop(easy, easy - 1)
    assert found.difference == pytest.approx((1, 1, 1))
    assert mean_interval(easy).high - mean_interval(easy).low > 5
    assert found.relative is not None and found.relative.mean == pytest.approx(1 / easy.mean())
    assert paired_drop(easy, easy).difference == (0, 0, 0)


def test_a_rise_is_a_negative_drop_and_nothing_has_no_share() -> None:
    assert paired_drop([1.0, 1.0], [2.0, 2.0]).relative == (-1, -1, -1)
    nothing = paired_drop([0.0, 0.0], [1.0, 0.0])
    assert nothing.relative is None and nothing.difference.mean == -0.5


def test_is_free_of_torch() -> None:
    code = "import sys, edgeprune.common.intervals, edgeprune.metrics.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeds_are_drawn_as_prompts_are() -> None:
    apart = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert mean_interval(apart) == (0.5, 0, 1)  # prompts agree, seeds do not
    assert mean_interval(np.full((3, 50), 0.25)) == (0.25, 0.25, 0.25)
    drop = paired_drop(np.ones(50), apart)
    assert drop.difference == (0.5, 0, 1) and drop.relative == (0.5, 0, 1)
    both = paired_drop(apart, np.zeros((3, 50))).difference
    assert both == (0.5, 0, 1)


def test_one_prompt_a_task_still_has_an_interval() -> None:
    found = mean_interval([1, 0, 1, 1], ["a", "b", "c", "d"])
    assert found.mean == 0.75 and found.low <= 0.5 < 1.0 <= found.high
    uneven = mean_interval([0, *[1, 0.9] * 10], ["a", *["b"] * 20])
    assert uneven.mean == pytest.approx(0.475) and uneven.low < uneven.mean < uneven.high < 0.5
