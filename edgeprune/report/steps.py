"""Times a step of two models against each other on a machine that may have other work.

The models take turns, and the figure is the median of the ratios of neighbouring steps. The ratio of two medians is no
substitute: on a busy machine a long step is interrupted more often than a short one, and where that is more than half
of the long steps and less than half of the short ones, the ratio of medians is too small by up to a half.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeprune.residency.streaming import is_streamed
from edgeprune.sampling.denoising import at_once, encode_prompts, evaluate, latent_shape, noise
from edgeprune.stages.work import block_by_block_s
from edgeprune.stages.workspace import Workspace

LEAST, MOST, LIMIT_S = 9, 99, 20.0
"""Pairs of steps: at least, at most, and seconds after which only LEAST are made."""
LONG_S = 30.0
"""Seconds of the first pair after which it is the only one: nothing that takes so long is disturbed by much."""
_PRECISE = 0.02
"""More pairs are timed until the standard error of the median ratio is below this share of it."""
_STEADY = 0.15
"""Spread of the ratios, as a share of their median, above which a figure is shown with its spread."""


@dataclass(frozen=True)
class StepTimes:
    """Times of one step, and their ratio."""

    first_s: float
    """Median seconds."""
    other_s: float
    ratio: float
    """Median of other / first over pairs of neighbouring steps."""
    quartiles: tuple[float, float] | None
    """Half of the pairs have a ratio between these; None of one pair, and where blocks were timed."""


def ratio_text(ratio: float, quartiles: Sequence[float] | None) -> str:
    """Return the ratio with two decimals, with its quartiles where the pairs spread over more than 15 %.

    Args:
        ratio: the median over pairs.
        quartiles: None where they are not known.
    """
    if quartiles is None or quartiles[1] - quartiles[0] <= _STEADY * ratio:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} ({quartiles[0]:.2f} to {quartiles[1]:.2f})"


@torch.no_grad()
def step_times(ws: Workspace, first: Any, other: Any) -> StepTimes:
    """Time one step of two models of a workspace: two evaluations, of `other` one if it has learned guidance.

    Of models whose blocks are read when they run, a step takes minutes: one block of each kind is timed instead.
    """
    c = encode_prompts(ws.pipe, ["", "a red circle"], ws.generation.max_sequence_length)
    x = noise([0, 0], latent_shape(ws.pipe, ws.generation))
    sigma, guidance = torch.full((2,), 0.5), ws.generation.guidance_scale
    others = 1 if ws.training_option("guidance") else len(x)
    if is_streamed(ws.family.blocks(first)[0]):
        count = min(len(x), at_once(first, x.shape))
        part = x[:count], c[:count], sigma[:count], guidance
        each = block_by_block_s(ws.family, first, part), block_by_block_s(ws.family, other, part)
        one, two = each[0] * len(x) / count, each[1] * others / count
        return StepTimes(one, two, two / one, None)

    def once(model: Any, count: int) -> float:
        began = time.perf_counter()
        evaluate(model, x[-count:], c[-count:], sigma[-count:], guidance)
        return time.perf_counter() - began

    return alternate(lambda: once(first, len(x)), lambda: once(other, others))


def alternate(first: Callable[[], float], other: Callable[[], float]) -> StepTimes:
    """Time two things in turn until the median ratio is known to 2 %, or for LIMIT_S; once if that takes LONG_S.

    Args:
        first: does the work once and returns its seconds.
        other: the same.
    """
    once = first(), other()
    if sum(once) > LONG_S:
        return StepTimes(once[0], once[1], once[1] / once[0], None)
    pairs: list[tuple[float, float]] = []  # the first was to warm up
    while len(pairs) < LEAST or not _enough(pairs):
        if len(pairs) % 2:  # each is first in half of the pairs
            b = other()
            pairs.append((first(), b))
        else:
            pairs.append((first(), other()))
    times = np.array(pairs)
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    seconds = np.median(times, axis=0)
    return StepTimes(float(seconds[0]), float(seconds[1]), float(ratio), (float(low), float(high)))


def _enough(pairs: list[tuple[float, float]]) -> bool:
    times = np.array(pairs)
    if len(times) >= MOST or times.sum() > LIMIT_S:
        return True
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    # Of a median of normal values: 1.25 standard deviations / sqrt(N), each 0.74 of the distance between quartiles.
    return bool(0.93 * (high - low) / math.sqrt(len(times)) < _PRECISE * ratio)
