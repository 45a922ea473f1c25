"""Bootstrap intervals: known answers, pairing, tasks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgeprune.common.intervals import mean_interval, paired_drop


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 8)
    assert mean_interval(np.ones(4)) == (1, 1, 1)


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
