"""The protocol itself: take a group out, score, put it back. Any metric. One model load; swaps are made in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgeprune.analysis.contribution import Group, removed
from edgeprune.families import Family


class Exhaustive:
    """See the module."""

    name = "exhaustive"
    metrics: tuple[str, ...] | None = None
    backward = False

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        self.family, self.metric, self.mean = family, metric, mean

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """In the given order."""
        for parts in groups:
            with removed(self.family, self.metric.pipe.transformer, parts, self.mean):
                scores = self.metric.score()
            yield parts, scores

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int) -> float:
        """One score each."""
        return len(groups) * per_score

    @staticmethod
    def held(stream_bytes: int, saved_bytes: int, per_score: int) -> int:
        """Nothing."""
        return 0


ESTIMATOR = Exhaustive
