"""States that a tail is trained from, mapped from files: what comes out of the frozen prefix, and the teacher's answer.

Each file holds states of one size, in the dtype that the original computes in; only targets are always float32:

    image (S, N, D), text (S, M, D), modulation (S, D)   of the student, before its first trained block
    taught.image, taught.text, taught.modulation         of the teacher, where features are compared
    velocity, target (S, C, h, w)                        the teacher's velocity, and noise minus clean latents
    position.0, ...                                      what every block reads that depends on sizes alone
    grid (2)                                             height and width in tokens, where the output needs them

Notation: S states of a file, B batch, N image tokens, M text tokens, D width, C latent channels.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import InputError
from edgeprune.common.tensors import Tensors

STREAMS = ("image", "text", "modulation")
"""What a block gets."""
_OF_STATES = (*STREAMS, "velocity", "target")


@dataclass(frozen=True)
class StateBatch:
    """Some states of one size."""

    streams: Tensors
    """`image` (B, N, D), `text` (B, M, D) and `modulation` (B, D), before the student's first trained block."""
    velocity: torch.Tensor
    """The teacher's (B, C, h, w), float32."""
    target: torch.Tensor
    """Noise minus clean latents (B, C, h, w), float32."""
    taught: Tensors = field(default_factory=dict)
    """The same of the teacher; none where no features are compared."""
    positions: tuple[torch.Tensor, ...] = ()
    grid: tuple[int, ...] = ()

    def __getitem__(self, rows: slice) -> StateBatch:
        """Return some of the states."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> StateBatch:
        """Return the states on a device."""
        moved = self._each(lambda tensor: tensor.to(device))
        return replace(moved, positions=tuple(position.to(device) for position in self.positions))

    def _each(self, change: Any) -> StateBatch:
        return replace(
            self,
            streams={name: change(tensor) for name, tensor in self.streams.items()},
            taught={name: change(tensor) for name, tensor in self.taught.items()},
            velocity=change(self.velocity), target=change(self.target),
        )  # fmt: skip


class States:
    """All states of a round. Only those of a batch are read.

    Args:
        files: as stages/states.py writes them.

    Raises:
        InputError: a file cannot be read or lacks a tensor, or there is none.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        groups: dict[tuple[Any, ...], list[Tensors]] = {}
        for path in files:
            shard = _mapped(path)
            groups.setdefault(tuple(tuple(shard[name].shape[1:]) for name in _OF_STATES), []).append(shard)
        if not groups:
            raise InputError("states: found no files")
        self._groups = [groups[key] for key in sorted(groups)]
        self._ends = [list(itertools.accumulate(len(shard["image"]) for shard in group)) for group in self._groups]

    def __len__(self) -> int:
        return sum(ends[-1] for ends in self._ends)

    def batch(self, size: int, generator: torch.Generator) -> StateBatch:
        """Draw states of one size, with replacement; each is drawn equally often.

        Args:
            size: how many, B.
            generator: of the draws.
        """
        totals = list(itertools.accumulate(ends[-1] for ends in self._ends))
        at = bisect.bisect_right(totals, int(torch.randint(totals[-1], (), generator=generator)))
        group, ends = self._groups[at], self._ends[at]
        rows = []
        for index in torch.randint(ends[-1], (size,), generator=generator).tolist():
            place = bisect.bisect_right(ends, index)
            rows.append((group[place], index - (ends[place - 1] if place else 0)))

        def stacked(name: str) -> torch.Tensor:
            return torch.stack([shard[name][row] for shard, row in rows])

        first = group[0]
        return StateBatch(
            streams={name: stacked(name) for name in STREAMS},
            taught={name: stacked(f"taught.{name}") for name in STREAMS if f"taught.{name}" in first},
            velocity=stacked("velocity").float(), target=stacked("target"),
            positions=tuple(first[name] for name in sorted(first) if name.startswith("position.")),
            grid=tuple(first["grid"].tolist()),
        )  # fmt: skip


def file_tensors(batch: StateBatch) -> Tensors:
    """Return the tensors of a file that holds these states."""
    taught: Mapping[str, torch.Tensor] = {f"taught.{name}": tensor for name, tensor in batch.taught.items()}
    positions = {f"position.{index}": position for index, position in enumerate(batch.positions)}
    own = {"velocity": batch.velocity, "target": batch.target}
    return {**batch.streams, **taught, **own, **positions, "grid": torch.tensor(batch.grid, dtype=torch.int64)}


def _mapped(path: Path) -> Tensors:
    """Map a file's tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not states of training ({error}); delete it to make it again") from error
    if missing := sorted({*_OF_STATES, "grid"} - tensors.keys()):
        raise InputError(f"{path}: {missing[0]}: found no such tensor; delete the file to make it again")
    return tensors
