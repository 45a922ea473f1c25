"""Reuse: the same scores as `exhaustive` with less work, because the blocks before a group are not run again.

It goes block by block. It keeps the outputs of block k - 1 for every state, scores all groups that begin at block k
from them, then runs block k once, unchanged. Only one block's outputs are kept at a time. The scores are those of
`exhaustive`, to the bit, since the model's own forward pass runs, with blocks replaced. Metrics that sample images
cannot be estimated this way: there, a change also alters the input to the first block at the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgeprune.analysis.contribution import Group, removal, swapped
from edgeprune.families import Family
from edgeprune.residency.streaming import filled


class _Recorder(nn.Module):
    """A block that records its outputs, one entry per batch."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.kept = block, list[Any]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and record its output."""
        out = self.block(*args, **kwargs)
        self.kept.append(out)
        return out


class Replay(nn.Module):
    """Replays a block's recorded outputs, one per call, and starts over at the end."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept, self.calls = kept, 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the next recorded output, whatever the input."""
        self.calls += 1
        return self.kept[(self.calls - 1) % len(self.kept)]


class Reuse:
    """Scores by running only the blocks from the start of each group on."""

    name = "reuse"
    metrics: tuple[str, ...] | None = ("velocity",)
    backward = False
    compares = True

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        self.family, self.metric, self.mean = family, metric, mean

    @torch.no_grad()
    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """Yield scores in the order of the blocks at which groups begin."""
        model = self.metric.pipe.transformer
        count = len(self.family.blocks(model))
        slots = [self.family.removal(model, block, None, self.mean)[0] for block in range(count)]
        begins = {parts: parts[0][0] if parts else 0 for parts in groups}
        kept: list[Any] = []
        for block in range(max(begins.values(), default=-1) + 1):
            before = slots[: max(0, block - 1)]
            if block:
                before = [*before, replace(slots[block - 1], replacement=Replay(kept))]
            for parts in (parts for parts, begin in begins.items() if begin == block):
                with swapped([*before, *removal(self.family, model, parts, self.mean)]):
                    scores = self.metric.score()
                yield parts, scores
            recorded = self.family.blocks(model)[block]
            recorder = _Recorder(recorded)
            alone = [*before, replace(slots[block], replacement=recorder), *slots[block + 1 :]]
            with swapped(alone), filled(recorded):
                self.metric.score()
            kept = recorder.kept

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int, *, streamed: bool = False) -> float:
        """Return, per group, its own blocks and those after it, and every block once unchanged."""
        begins = [parts[0][0] if parts else 0 for parts in groups]
        return sum(blocks - begin for begin in begins) * per_score / blocks + per_score

    @staticmethod
    def extra_bytes(stream_bytes: int, saved_bytes: int, per_score: int, batch: int, *, streamed: bool) -> int:
        """Return two blocks' outputs for every sample: those recorded, and those being recorded."""
        return 2 * stream_bytes * per_score


ESTIMATOR = Reuse
