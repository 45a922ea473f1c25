"""What distillation trains on: random batches of latents and encoded prompts, drawn from files on disk.

Files are memory-mapped: pages load on demand and can be evicted, so the data may exceed RAM. encode.py makes the files
and cache.py reads them.

Notation: B batch, S samples, T texts, C latent channels, M text tokens, K and P text widths.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """The data of one step: latents (B, C, h, w), hidden (B, M, K), pooled (B, P), all float32."""

    latents: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Samples:
    """Samples of one size, in memory or mapped from a file. Row 0 of the encoded texts is the empty prompt."""

    latents: torch.Tensor
    """(S, C, h, w), normalised."""
    rows: torch.Tensor
    """(S), the row of each sample's text in `hidden` and `pooled`."""
    hidden: torch.Tensor
    """(T, M, K)."""
    pooled: torch.Tensor
    """(T, P)."""


class _Bucket:
    """All samples of one size, from several shards, as one list."""

    def __init__(self, shards: list[Samples]) -> None:
        self.shards = shards
        self.ends = list(itertools.accumulate(len(shard.latents) for shard in shards))

    def sample(self, index: int, dropped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a sample's latents, hidden and pooled text; the text is the empty prompt if `dropped`."""
        at = bisect.bisect_right(self.ends, index)
        shard = self.shards[at]
        place = index - (self.ends[at - 1] if at else 0)
        row = 0 if dropped else int(shard.rows[place])
        return shard.latents[place], shard.hidden[row], shard.pooled[row]


class Pairs:
    """All samples of a cache. Only the samples of a batch are read from disk."""

    def __init__(self, shards: Sequence[Samples]) -> None:
        """Group the samples by the size of their latents, keeping their order."""
        grouped: dict[tuple[int, ...], list[Samples]] = {}
        for shard in shards:
            grouped.setdefault(tuple(shard.latents.shape[1:]), []).append(shard)
        self._buckets = [_Bucket(same_size) for _, same_size in sorted(grouped.items())]
        self._ends = list(itertools.accumulate(bucket.ends[-1] for bucket in self._buckets))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty prompt: hidden (1, M, K) and pooled (1, P), float32."""
        shard = self._buckets[0].shards[0]
        return shard.hidden[:1].float(), shard.pooled[:1].float()

    def batch(self, size: int, drop: float, generator: torch.Generator) -> Batch:
        """Draw a random batch whose latents all have one size.

        A size is drawn in proportion to its number of samples, so all samples are drawn equally often.

        Args:
            size: the number of samples B.
            drop: the probability that a sample's text is replaced by the empty prompt.
        """
        bucket = self._buckets[0]
        if len(self._buckets) > 1:
            sample = int(torch.randint(len(self), (), generator=generator))
            bucket = self._buckets[bisect.bisect_right(self._ends, sample)]
        picked = torch.randint(bucket.ends[-1], (size,), generator=generator).tolist()
        dropped = (torch.rand(size, generator=generator) < drop).tolist()
        samples = [bucket.sample(index, without_text) for index, without_text in zip(picked, dropped, strict=True)]
        latents, hidden, pooled = (torch.stack(tensors).float() for tensors in zip(*samples, strict=True))
        return Batch(latents=latents, hidden=hidden, pooled=pooled)
