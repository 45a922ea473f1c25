"""Times of steps on a machine with other work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgeprune.report import steps


@pytest.fixture(autouse=True)
def many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as outside of the tests."""
    monkeypatch.setattr(steps, "MOST", 99)


def interrupted(seconds: float, seed: int) -> Callable[[], float]:
    """Return a step that takes `seconds`, and 25 ms more with each interruption: 32 in a second of work."""
    rng = np.random.default_rng(seed)
    return lambda: seconds + 0.025 * float(rng.poisson(32 * seconds))


def test_interruptions_hit_long_steps_more_often() -> None:
    """27 ms against 15.6 ms: the ratio of medians is 0.3, as once published; that of pairs is near 0.58."""
    first, other = interrupted(0.027, 1), interrupted(0.0156, 2)
    medians = np.median([other() for _ in range(99)]) / np.median([first() for _ in range(99)])
    assert medians == pytest.approx(0.3, abs=0.02)
    found = [steps.alternate(interrupted(0.027, i), interrupted(0.0156, 100 + i)) for i in range(20)]
    assert np.median([f.ratio for f in found]) == pytest.approx(0.578, rel=0.15)
    assert all(" to " in steps.ratio_text(f.ratio, f.quartiles) for f in found)


def test_a_quiet_machine_takes_few_pairs() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], float]:
        return lambda: calls.append(name) or seconds  # type: ignore[func-returns-value]

    found = steps.alternate(step("a", 0.02), step("b", 0.01))
    assert found == steps.StepTimes(0.02, 0.01, 0.5, (0.5, 0.5))
    assert "".join(calls[2:]) == ("abba" * 5)[: 2 * steps.LEAST]
    assert steps.ratio_text(found.ratio, found.quartiles) == "0.50"


def test_slow_steps_end_at_the_limit() -> None:
    rng, count = np.random.default_rng(0), [0]

    def slow() -> float:
        count[0] += 1
        return float(rng.uniform(2, 12))

    steps.alternate(slow, slow)
    assert count[0] == 2 + 2 * steps.LEAST


def test_steps_of_minutes_are_timed_once_and_have_no_spread() -> None:
    calls: list[float] = []
    found = steps.alternate(lambda: calls.append(300.0) or 300.0, lambda: calls.append(240.0) or 240.0)
    assert calls == [300.0, 240.0]
    assert (found.first_s, found.other_s, found.ratio, found.quartiles) == (300.0, 240.0, 0.8, None)
