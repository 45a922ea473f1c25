"""What a LoRA changes in each weight, of the original and of the pruned model.

Surgery is linear in the weights, if mean and basis of the modulation input stay those of the artefact: rows and columns
are cut, a projected modulation is W P^T, and the bias of a projected or removed one W m + b. So the surgery of the
changed original minus that of the original is the surgery of the difference. This holds for distilled weights too: the
difference is added to what they are.

DoRA changes W into M (W + BA) / |W + BA|, where |.| is the length of each row or column (Liu et al. 2024, equation 5).
Its difference depends on the original's W, which is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from edgeprune.artefact.lora.names import TRANSFORMER
from edgeprune.artefact.lora.reading import Change, Lora
from edgeprune.artefact.surgery import Read, prune_tensor
from edgeprune.common.errors import InputError
from edgeprune.families import Shape, Source


class Differences:
    """The differences of a part's tensors, computed when they are asked for."""

    def __init__(self, lora: Lora, part: str, shapes: Mapping[str, Shape], read: Read, scale: float = 1.0) -> None:
        """Find the tensors that change.

        Args:
            lora: what the file says.
            part: TRANSFORMER, or a text encoder.
            shapes: of the part's tensors by name.
            read: reads a tensor of the original.
            scale: multiplies every difference.

        Raises:
            InputError: a layer has no bias to change.
        """
        self._changes: dict[str, Change] = {}
        self._shapes, self._read, self._scale = shapes, read, scale
        for change in lora.changes:
            if change.part != part:
                continue
            if change.down is not None or change.weight is not None:
                self._changes[f"{change.layer}.weight"] = change
            if change.bias is not None:
                if f"{change.layer}.bias" not in shapes:
                    raise InputError(f"{lora.path}: {change.names[0]}: {change.key} has no bias to change")
                self._changes[f"{change.layer}.bias"] = change

    def __contains__(self, name: str) -> bool:
        """Return whether a tensor of the original changes."""
        return name in self._changes

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the difference of a tensor of the original in float32; zeros where nothing changes."""
        if name not in self._changes:
            return torch.zeros(self._shapes[name])
        change = self._changes[name]
        if name.endswith(".bias"):
            assert change.bias is not None
            return change.bias * self._scale
        return _of_weight(change, lambda: self._read(name).float()).reshape(self._shapes[name]) * self._scale

    def pruned(self, source: Source, mean: torch.Tensor | None, basis: torch.Tensor | None) -> torch.Tensor | None:
        """Return the difference of a tensor of the pruned model; None where nothing changes.

        Args:
            source: what the tensor is made from.
            mean: see `prune_tensor`.
            basis: see `prune_tensor`.
        """
        reads = {source.name} | ({f"{source.name.removesuffix('bias')}weight"} if source.constant else set())
        if source.calibrated or not any(name in self for name in reads):
            return None
        return prune_tensor(self.__getitem__, source, mean, basis)


def encoders_of(lora: Lora) -> list[str]:
    """Return the text encoders that a file changes."""
    return sorted({change.part for change in lora.changes} - {TRANSFORMER})


def _of_weight(change: Change, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the difference of a weight (O, I...)."""
    parts = [] if change.down is None or change.up is None else [change.up @ change.down.flatten(1)]
    if change.weight is not None:
        parts.append(change.weight if change.weight.dim() == 1 else change.weight.flatten(1))
    difference: torch.Tensor = sum(parts[1:], parts[0])
    if change.magnitude is None:
        return difference
    weight = read().flatten(1)
    changed = weight + difference
    length = torch.linalg.vector_norm(changed, dim=1 if change.magnitude.shape[1] == 1 else 0, keepdim=True)
    merged: torch.Tensor = change.magnitude * changed / length.clamp_min(torch.finfo(length.dtype).tiny)
    return merged - weight
