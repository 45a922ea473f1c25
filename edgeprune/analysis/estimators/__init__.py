"""How contributions are come by: the model is run without each group, or what that would give is estimated.

An estimator scores a running pipeline's transformer without groups of parts, one value per prompt, higher is better.
A new one is one new file, listed in `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from edgeprune.analysis.contribution import Group
from edgeprune.common.errors import InputError
from edgeprune.families import Family

_MODULES = {n: f"edgeprune.analysis.estimators.{n}" for n in ("exhaustive", "reuse", "gates")}


class Estimator(Protocol):
    """See the module."""

    name: str
    metrics: tuple[str, ...] | None
    """Names of the metrics that it can estimate; None for every one."""
    backward: bool
    """Whether it takes gradients."""

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        """Prepare with the untouched model.

        Args:
            metric: prepared with the pipeline, see metrics/.
            mean: mean modulation input (D), which removed norms are fixed at.
        """

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """Scores without each group, in whatever order they are found; the empty group is the untouched model."""

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int) -> float:
        """The work of `estimate` in evaluations of the whole transformer for one sample.

        A backward pass that takes no gradient of a weight counts as one evaluation.

        Args:
            blocks: how many the transformer has.
            per_score: samples that the metric sends through the transformer for one score.
        """

    @staticmethod
    def held(stream_bytes: int, saved_bytes: int, per_score: int) -> int:
        """Bytes held beside weights and a forward pass.

        Args:
            stream_bytes: of a block's outputs, for one sample.
            saved_bytes: what autograd keeps of one sample for a backward pass; 0 unless `backward`.
        """


def estimator_named(name: str, metric: str) -> type[Estimator]:
    """The class of an estimator.

    Raises:
        InputError: unknown name, or a metric that it cannot estimate.
    """
    if name not in _MODULES:
        raise InputError(f"--estimator: found {name!r}, expected one of {', '.join(_MODULES)}")
    found: type[Estimator] = importlib.import_module(_MODULES[name]).ESTIMATOR
    if found.metrics is not None and metric not in found.metrics:
        raise InputError(f"--estimator {name} works with --metric {', '.join(found.metrics)}, found {metric}")
    return found
