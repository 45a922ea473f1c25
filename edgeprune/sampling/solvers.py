"""Solvers of the flow's equation dx/dsigma = v(x, sigma): how a sampler goes from one noise level to the next.

A solver is a function of a `Step`. It works on arrays of numpy and tensors of torch alike, in float32. All evaluate the
model once a level; those of higher order remember earlier evaluations, so their first step is of first order. All visit
each noise level once but Heun's, which comes back to it (`visited`).

A sample at noise level sigma is x = (1 - sigma) x0 + sigma noise, so the clean sample that a velocity v points to is
x0 = x - sigma v. DPM-Solver++ (Lu et al., 2022, https://arxiv.org/abs/2211.01095) and UniPC (Zhao et al., 2023,
https://arxiv.org/abs/2302.04867) are linear in x0 over lambda = log((1 - sigma) / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

EULER, HEUN = "euler", "heun"


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    levels: Sequence[float]
    """The run's noise levels, from high to low; the last may be 0."""
    index: int
    """The step goes from `levels[index]` to the next."""
    sample: Any
    """x at this level, of any shape."""
    velocity: Any
    """v of the sample at this level."""
    past: tuple[Any, ...]
    """What the solver returned beside the last sample; empty at the first step."""

    @property
    def sigma(self) -> float:
        """The noise level before the step."""
        return float(self.levels[self.index])

    @property
    def following(self) -> float:
        """The noise level after it."""
        return float(self.levels[self.index + 1])

    @property
    def before(self) -> float:
        """The noise level before the last step."""
        return float(self.levels[self.index - 1])

    @property
    def bends(self) -> bool:
        """Whether a line through x0 at the last level and at this one is known: not to 0, nor where levels coincide."""
        snr = [_log_snr(level) for level in (self.before, self.sigma, self.following) if level > 0]
        return len({*snr}) == 3


Stepped = tuple[Any, tuple[Any, ...]]
"""The sample at the next level, and what the next step needs."""


def euler(step: Step) -> Stepped:
    """Go straight along the velocity."""
    return step.sample + (step.following - step.sigma) * step.velocity, ()


def heun(step: Step) -> Stepped:
    """Heun's method: go along the velocity, then again along the mean of it and the velocity there; two evaluations."""
    if not step.past:
        return step.sample + (step.following - step.sigma) * step.velocity, (step.velocity, step.sample)
    first, start = step.past
    return start + (step.sigma - step.before) / 2 * (first + step.velocity), ()


def ab2(step: Step) -> Stepped:
    """Adams-Bashforth of second order with variable steps: along the line through this velocity and the last one."""
    width, slope = step.following - step.sigma, step.velocity
    if step.past and step.sigma != step.before:
        (last,) = step.past
        slope = slope + width / (2 * (step.sigma - step.before)) * (slope - last)
    return step.sample + width * slope, (step.velocity,)


def dpmpp_2m(step: Step) -> Stepped:
    """DPM-Solver++(2M): second order in x0, the last step to 0 of first order."""
    clean = step.sample - step.sigma * step.velocity
    direction = clean
    if step.past and step.bends:
        (last,) = step.past
        direction = clean + (clean - last) / (2 * _ratio(step.before, step.sigma, step.following))
    return _exponential(step.sample, direction, step.sigma, step.following), (clean,)


def dpmpp_2s(step: Step) -> Stepped:
    """DPM-Solver++(2S) in steps of two levels: first order to the first, then from the start again, of second order."""
    clean = step.sample - step.sigma * step.velocity
    if step.past and step.bends and step.index < len(step.levels) - 2:
        first, start = step.past
        ratio = (_log_snr(step.sigma) - _log_snr(step.before)) / (_log_snr(step.following) - _log_snr(step.before))
        return _exponential(start, first + (clean - first) / (2 * ratio), step.before, step.following), ()
    return _exponential(step.sample, clean, step.sigma, step.following), (clean, step.sample)


def unipc(step: Step) -> Stepped:
    """UniPC-2 with B(h) = e^h - 1: each evaluation first corrects the step that led to it; so it is of third order."""
    clean, sample = step.sample - step.sigma * step.velocity, step.sample
    if step.past and _log_snr(step.before) != _log_snr(step.sigma):
        sample = _corrected(step, clean)  # x0 stays what the velocity of the predicted sample pointed to
    direction = clean
    if step.past and step.bends:
        direction = clean + (clean - step.past[0]) / (2 * _ratio(step.before, step.sigma, step.following))
    earlier = step.past[:1]
    return _exponential(sample, direction, step.sigma, step.following), (clean, sample, *earlier)


def _corrected(step: Step, clean: Any) -> Any:
    """Return the sample at this level again, from the last one and x0 at both."""
    last, start, *earlier = step.past
    h = _log_snr(step.before) - _log_snr(step.sigma)
    grown = math.expm1(h)
    ratio = (_log_snr(float(step.levels[step.index - 2])) - _log_snr(step.before)) / -h if earlier else 0.0
    if ratio:
        first, second = _moments(h)
        weight = (second - first) / (ratio - 1)  # of two equations: their sum is `first`, and ratio w + w' = `second`
        direction = last + weight / ratio * (earlier[0] - last) + (first - weight) * (clean - last)
    else:
        direction = (last + clean) / 2
    return step.sigma / step.before * start - (1 - step.sigma) * grown * direction


def _moments(h: float) -> tuple[float, float]:
    """Return the right sides of the equations for UniPC's weights, for B(h) = e^h - 1; h is negative."""
    phi = math.expm1(h) / h - 1
    return phi / math.expm1(h), 2 * (phi / h - 0.5) / math.expm1(h)


def _log_snr(sigma: float) -> float:
    """Return lambda = log((1 - sigma) / sigma), with pure noise at 1 - 1e-6, as diffusers has it."""
    sigma = min(sigma, 1 - 1e-6)
    return math.log((1 - sigma) / sigma)


def _ratio(before: float, sigma: float, following: float) -> float:
    """Return the width of the last step over that of this one, in lambda."""
    return (_log_snr(sigma) - _log_snr(before)) / (_log_snr(following) - _log_snr(sigma))


def _exponential(sample: Any, clean: Any, sigma: float, following: float) -> Any:
    """Go to the next level along a constant x0: exact, whatever the width of the step."""
    kept = following / sigma
    return kept * sample + ((1 - following) - kept * (1 - sigma)) * clean


def visited(solver: str, levels: Sequence[float]) -> list[int]:
    """Return the indices of the levels, the last among them, in the order in which a solver comes to them."""
    each = range(len(levels))
    return [i for i in each for _ in range(2 if solver == HEUN and 0 < i < len(levels) - 1 else 1)]


SOLVERS: dict[str, Callable[[Step], Stepped]] = {
    EULER: euler, HEUN: heun, "ab2": ab2, "dpmpp_2m": dpmpp_2m, "dpmpp_2s": dpmpp_2s, "unipc": unipc,
}  # fmt: skip
