"""The same scores with less work: the blocks before a group give what they gave before, and are not run again.

Block by block: every state's streams before block k are kept, all groups that begin at k are scored from them, then k
is run once as it is. Only one block's inputs are kept at a time. The numbers are those of `exhaustive`, to the bit,
since the model's own forward pass runs, with blocks replaced. What it leaves out: metrics that sample images, where a
change shows in the next step's inputs to the first block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgeprune.analysis.contribution import Group, removal, swapped
from edgeprune.families import Family


class _Recorder(nn.Module):
    """A block that keeps what it gives, batch by batch."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.kept = block, list[Any]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block."""
        out = self.block(*args, **kwargs)
        self.kept.append(out)
        return out


class Replay(nn.Module):
    """Gives what a block gave, batch by batch, round and round."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept, self.calls = kept, 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Whatever comes in."""
        self.calls += 1
        return self.kept[(self.calls - 1) % len(self.kept)]


class Reuse:
    """See the module."""

    name = "reuse"
    metrics: tuple[str, ...] | None = ("velocity",)
    backward = False

    def __init__(self, family: Family, metric: Any, mean: torch.Tensor) -> None:
        self.family, self.metric, self.mean = family, metric, mean

    @torch.no_grad()
    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """In the order of the blocks that groups begin at."""
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
            recorder = _Recorder(self.family.blocks(model)[block])
            alone = [*before, replace(slots[block], replacement=recorder), *slots[block + 1 :]]
            with swapped(alone):
                self.metric.score()
            kept = recorder.kept

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int) -> float:
        """A group's own blocks and those after it; and every block once as it is."""
        begins = [parts[0][0] if parts else 0 for parts in groups]
        return sum(blocks - begin for begin in begins) * per_score / blocks + per_score

    @staticmethod
    def held(stream_bytes: int, saved_bytes: int, per_score: int) -> int:
        """What a block gave, of every sample, and while it is made what the block before gave."""
        return 2 * stream_bytes * per_score


ESTIMATOR = Reuse
