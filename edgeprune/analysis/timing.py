"""How long a step takes, whole and without each part, in torch on this machine; for plans under a latency budget.

What it leaves out: other devices and runtimes. Their shares are alike where time goes with work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from edgeprune.analysis.contribution import Key, removed
from edgeprune.families import Family

REPEATS = 7


@torch.no_grad()
def step_seconds(
    family: Family,
    model: Any,
    step: Callable[[], object],
    parts: list[Key],
    mean: torch.Tensor,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, dict[Key, float]]:
    """Median seconds of a step of the whole model, and how many fewer each part's removal takes, never below 0.

    Each removal is measured beside the whole model, so that a machine that gets busy slows both.

    Args:
        step: runs the model once.
        mean: mean modulation input (D).
    """

    def once() -> float:
        began = clock()
        step()
        return clock() - began

    once()
    whole: list[float] = []
    saved = {}
    for part in parts:
        differences = []
        for _ in range(REPEATS):
            whole.append(once())
            with removed(family, model, [part], mean):
                differences.append(whole[-1] - once())
        saved[part] = max(0.0, statistics.median(differences))
    return statistics.median(whole) if whole else once(), saved
