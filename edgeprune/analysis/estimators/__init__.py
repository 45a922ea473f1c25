"""How scores are obtained: by running the model without each group, or by estimating what that would give.

An estimator scores the transformer of a loaded pipeline without groups of parts: one value per prompt, higher is
better. A new one is one new file, listed in `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from edgeprune.analysis.contribution import Group
from edgeprune.common.errors import InputError
from edgeprune.families import Family

AUTO = "auto"
"""In options: the estimator that is right for the model."""
_MODULES = {n: f"edgeprune.analysis.estimators.{n}" for n in ("exhaustive", "reuse", "gates")}


class Estimator(Protocol):
    """Scores a pipeline's transformer without groups of parts."""

    name: str
    metrics: tuple[str, ...] | None
    """Names of the metrics that it can estimate; None means all."""
    backward: bool
    """Whether it runs a backward pass."""
    compares: bool
    """Whether the metric has to measure the untouched model, to compare with."""

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        """Prepare with the untouched model.

        Args:
            metric: prepared with the pipeline, see metrics/.
            mean: mean modulation input (D), which replaces the input of removed norms.
        """

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """Yield the scores without each group, in any order; the empty group is the untouched model."""

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int, *, streamed: bool = False) -> float:
        """Return the work of `estimate`, in evaluations of the full transformer for one sample.

        A backward pass without gradients of weights counts as one evaluation.

        Args:
            blocks: number of blocks of the transformer.
            per_score: samples that the metric sends through the transformer for one score.
            streamed: whether blocks are read when they run.
        """

    @staticmethod
    def extra_bytes(stream_bytes: int, saved_bytes: int, per_score: int, batch: int, *, streamed: bool) -> int:
        """Return the memory that `estimate` needs in addition to the weights and a forward pass.

        Args:
            stream_bytes: bytes of a block's outputs for one sample.
            saved_bytes: bytes that autograd saves of one sample for a backward pass, of a streamed model in one block;
                0 unless `backward`.
            per_score: as in `evaluations`.
            batch: samples that pass through the transformer together.
            streamed: as in `evaluations`.
        """


def estimator_named(name: str, metric: str) -> type[Estimator]:
    """Return the class of an estimator.

    Raises:
        InputError: the name is unknown, or it cannot estimate the metric.
    """
    if name not in _MODULES:
        raise InputError(f"--estimator: found {name!r}, expected one of {', '.join(_MODULES)}")
    estimator: type[Estimator] = importlib.import_module(_MODULES[name]).ESTIMATOR
    if estimator.metrics is not None and metric not in estimator.metrics:
        raise InputError(f"--estimator {name} works with --metric {', '.join(estimator.metrics)}, found {metric}")
    return estimator
