"""What distillation learns from: batches of latents with their encoded prompts, drawn from what is mapped from disk.

The pages of a file that is mapped are read when they are asked for and given back when memory is short, so it may be
larger than memory. What it leaves out: where the files come from (cache.py reads them, encode.py makes them).

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
    """One step's data: latents (B, C, h, w), hidden (B, M, K), pooled (B, P), all float32."""

    latents: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Samples of one size, in memory or mapped from a file. Row 0 of the encoded texts is the empty prompt."""

    latents: torch.Tensor
    """(S, C, h, w), normalised."""
    rows: torch.Tensor
    """(S), the text of each sample."""
    hidden: torch.Tensor
    """(T, M, K)."""
    pooled: torch.Tensor
    """(T, P)."""


class _Bucket:
    """Parts whose latents are of one size, as one list of samples."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.ends = list(itertools.accumulate(len(part.latents) for part in parts))

    def sample(self, index: int, dropped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, hidden and pooled text; those of the empty prompt if dropped."""
        at = bisect.bisect_right(self.ends, index)
        part = self.parts[at]
        place = index - (self.ends[at - 1] if at else 0)
        row = 0 if dropped else int(part.rows[place])
        return part.latents[place], part.hidden[row], part.pooled[row]


class Pairs:
    """All samples, whatever their number: only what a batch needs is read."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Parts in the order of their samples; those of one size of latents are drawn from together."""
        grouped: dict[tuple[int, ...], list[Part]] = {}
        for part in parts:
            grouped.setdefault(tuple(part.latents.shape[1:]), []).append(part)
        self._buckets = [_Bucket(parts) for _, parts in sorted(grouped.items())]
        self._ends = list(itertools.accumulate(bucket.ends[-1] for bucket in self._buckets))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def item_bytes(self) -> int:
        """Of a number as it is kept: 2 or 4."""
        return self._buckets[0].parts[0].latents.element_size()

    def batch(self, size: int, drop: float, generator: torch.Generator) -> Batch:
        """A random batch of one size of latents; a share `drop` of it has the empty prompt.

        A size is drawn as often as its share of the samples, so every sample is drawn equally often.
        """
        bucket = self._buckets[0]
        if len(self._buckets) > 1:
            sample = int(torch.randint(len(self), (), generator=generator))
            bucket = self._buckets[bisect.bisect_right(self._ends, sample)]
        picked = torch.randint(bucket.ends[-1], (size,), generator=generator).tolist()
        dropped = (torch.rand(size, generator=generator) < drop).tolist()
        found = [bucket.sample(*one) for one in zip(picked, dropped, strict=True)]
        return Batch(*(torch.stack(tensors).float() for tensors in zip(*found, strict=True)))
