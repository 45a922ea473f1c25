"""A transformer whose weights are on disk: filled at once, block by block while it runs, or only in name for a tracer.

The structure is on the meta device and takes no memory. What it leaves out: which folder it is, and hashes
(checkpoint.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.families import Family
from edgeprune.residency.weights import Weights

PACKED = (".weight_packed", ".weight_scale")
"""What is never converted: integers and their scales."""


class StoredTransformer:
    """Structure and weights of one transformer.

    Args:
        family: its family.
        model: the structure, on the meta device.
        weights: where its tensors are.

    Raises:
        InputError: the weights are not exactly those of the structure.
    """

    def __init__(self, family: Family, model: nn.Module, weights: Weights) -> None:
        self.family, self.model, self.weights = family, model.eval().requires_grad_(False), weights
        weights.check({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})

    def names(self, block: int | None) -> list[str]:
        """The tensors of a block, or for None those outside blocks."""
        if block is None:
            return [n for n in self.model.state_dict() if not self.family.in_block(n)]
        return [n for n in self.model.state_dict() if n.startswith(self.family.block_prefix(self.model, block))]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """One tensor; packed integers and scales as they are, all else in `dtype` (None: as it is)."""
        tensor = self.weights[name]
        return tensor if name.endswith(PACKED) else tensor.to(dtype or tensor.dtype)

    def fill(self, names: Iterable[str], dtype: torch.dtype | None = torch.float32) -> None:
        """Read these tensors into the model, as `read` does."""
        self.model.load_state_dict({n: self.read(n, dtype) for n in names}, strict=False, assign=True)
        self.model.requires_grad_(False)

    def drop(self, block: int) -> None:
        """Give a block's memory back."""
        self.family.blocks(self.model)[block].to("meta")

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model with all of its weights in memory."""
        self.fill(self.model.state_dict(), dtype)
        return self.model

    def running(self, dtype: torch.dtype = torch.float32) -> Any:
        """A copy of the model that holds one block at a time: each is read when it runs, and dropped after."""
        stored = StoredTransformer(self.family, copy.deepcopy(self.model), self.weights)
        stored.fill(stored.names(None), dtype)
        for index, block in enumerate(self.family.blocks(stored.model)):
            names = stored.names(index)
            block.register_forward_pre_hook(lambda *_, names=names: stored.fill(names, dtype))
            block.register_forward_hook(lambda block, *_: block.to("meta") and None)
        return stored.model

    def traceable(self, dtype: torch.dtype = torch.float32) -> Any:
        """A copy of the model with fake tensors: shapes and dtypes of the CPU, no data."""
        model = copy.deepcopy(self.model)
        wanted = {n: (t.shape, t.dtype if n.endswith(PACKED) else dtype) for n, t in model.state_dict().items()}
        with FakeTensorMode():
            fakes = {n: torch.empty(shape, dtype=kind) for n, (shape, kind) in wanted.items()}
        model.load_state_dict(fakes, strict=True, assign=True)
        return model.requires_grad_(False)
