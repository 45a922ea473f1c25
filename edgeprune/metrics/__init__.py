"""Metrics of a running pipeline: prepared once with the untouched model, then asked again and again.

A metric scores the pipeline's transformer as it is now, one value per prompt, higher is better. A new one is one
new file, listed in `_MODULES`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from edgeprune.errors import InputError
from edgeprune.generation import Generation

_MODULES = {"velocity": "edgeprune.metrics.velocity", "shapes": "edgeprune.metrics.shapes_score"}


class Metric(Protocol):
    """See the module."""

    name: str

    def __init__(self, pipe: Any, generation: Generation, prompts: list[str]) -> None:
        """Prepare with the untouched model."""

    @staticmethod
    def evaluations(generation: Generation, prompts: int, per_step: int) -> int:
        """How many samples go through the transformer for one score, `per_step` of them in each step of an image."""

    @staticmethod
    def preparing(generation: Generation, prompts: int, per_step: int) -> int:
        """How many go through it to prepare."""

    def score(self) -> list[float]:
        """Score the pipeline's transformer as it is now: one value per prompt."""


def metric_named(name: str) -> type[Metric]:
    """The class of a metric.

    Raises:
        InputError: unknown name.
    """
    if name not in _MODULES:
        raise InputError(f"--metric: found {name!r}, expected one of {', '.join(_MODULES)}")
    found: type[Metric] = importlib.import_module(_MODULES[name]).METRIC
    return found
