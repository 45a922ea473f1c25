"""Exhaustive: remove a group, score, restore it. Works with any metric. Swaps modules of one loaded model in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgeprune.analysis.contribution import Group, removed
from edgeprune.families import Family


class Exhaustive:
    """Scores by running the model without each group."""

    name = "exhaustive"
    metrics: tuple[str, ...] | None = None
    backward = False
    compares = True

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        self.family, self.metric, self.mean = family, metric, mean

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """Yield scores in the order of `groups`."""
        for parts in groups:
            with removed(self.family, self.metric.pipe.transformer, parts, self.mean):
                scores = self.metric.score()
            yield parts, scores

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int, *, streamed: bool = False) -> float:
        """Return one score per group."""
        return len(groups) * per_score

    @staticmethod
    def extra_bytes(stream_bytes: int, saved_bytes: int, per_score: int, batch: int, *, streamed: bool) -> int:
        """Return 0: swaps need no further memory."""
        return 0


ESTIMATOR = Exhaustive
