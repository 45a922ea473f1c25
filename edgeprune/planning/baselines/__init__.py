"""Depth-pruning methods to compare ours with: which blocks each removes, and how it is distilled.

A baseline is one file of this folder with a `BASELINE`; its name is what `--method` takes. All get the same budget, the
same training steps and the same data. What it leaves out: our own methods (plan.py).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """What a baseline may know of a model."""

    count: int
    """Of all blocks."""
    removable: Sequence[int]
    """Rising."""
    magnitudes: Sequence[float]
    """Root mean square of each block's weights; empty unless the baseline asks for them."""
    seed: int


@dataclass(frozen=True)
class Baseline:
    """One method."""

    name: str
    choose: Callable[[Blocks, int], list[int]]
    """Which so many of the removable blocks go."""
    features: str = "blocks"
    """What is distilled beside the velocity, see DistillOptions.features."""
    magnitudes: bool = False
    """Whether it reads weights."""
    drawn: bool = False
    """Whether another seed removes other blocks."""


@functools.cache
def baselines() -> dict[str, Baseline]:
    """All of them by name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.BASELINE.name: module.BASELINE for module in modules}
