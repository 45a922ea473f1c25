"""A transformer whose weights stay on disk until needed: loaded at once, block by block while it runs, or as fakes.

Its structure is on the meta device and takes no memory. Fake tensors are for tracing, which needs no data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.families import Family, Shape
from edgeprune.residency.streaming import PACKED, fitting, stream

CPU = torch.device("cpu")


class Reader(Protocol):
    """Tensors by name, each read or made on request, such as `Weights`."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Their shapes."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype."""

    def dtype(self, name: str) -> torch.dtype:
        """Return that dtype; nothing is read."""

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors in the background."""

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Check that names and shapes are exactly those of a model."""


class StoredTransformer:
    """Structure and weights of one transformer.

    Args:
        family: the model's family.
        model: the structure, on the meta device.
        weights: the tensors, on disk.

    Raises:
        InputError: names or shapes of the weights differ from the structure's.
    """

    def __init__(self, family: Family, model: nn.Module, weights: Reader) -> None:
        self.family, self.model, self.weights = family, model.eval().requires_grad_(False), weights
        weights.check({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})

    @property
    def numbers(self) -> int:
        """How many numbers the weights have; packed ones count by their bytes."""
        return sum(map(math.prod, self.weights.shapes.values()))

    def names(self, block: int | None) -> list[str]:
        """Return the names of a block's tensors, or for None of the tensors outside blocks."""
        if block is None:
            return [n for n in self.model.state_dict() if not self.family.in_block(n)]
        return [n for n in self.model.state_dict() if n.startswith(self.family.block_prefix(self.model, block))]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """Read one tensor and convert it to `dtype` (None: keep its own), except packed integers and their scales."""
        tensor = self.weights[name]
        return tensor if name.endswith(PACKED) else tensor.to(dtype or tensor.dtype)

    def fill(self, names: Iterable[str], dtype: torch.dtype | None = torch.float32) -> None:
        """Read these tensors into the model, as `read` does."""
        self.model.load_state_dict({n: self.read(n, dtype) for n in names}, strict=False, assign=True)
        self.model.requires_grad_(False)

    def drop(self, block: int) -> None:
        """Free a block's memory."""
        self.family.blocks(self.model)[block].to("meta")

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the model with all of its weights in memory."""
        self.fill(self.model.state_dict(), dtype)
        return self.model

    def running(self, dtype: torch.dtype | None = torch.float32, device: torch.device = CPU, *, keep: int = 0) -> Any:
        """Return a copy of the model whose blocks are read when they run, see streaming.py.

        Args:
            dtype: to compute in; None computes in the dtype of the file.
            device: to compute on.
            keep: bytes of blocks, in the dtype of their file, that may stay in memory.
        """
        stored = StoredTransformer(self.family, copy.deepcopy(self.model), self.weights)
        stored.fill(stored.names(None), dtype)
        blocks = self.family.blocks(stored.model)
        inside = {module for block in blocks for module in block.modules()}
        for child in stored.model.children():
            if inside.isdisjoint(child.modules()):
                child.to(device)
        prefixes = [self.family.block_prefix(stored.model, index) for index in range(len(blocks))]
        layers = [
            (block, {name: prefix + name for name in block.state_dict()})
            for block, prefix in zip(blocks, prefixes, strict=True)
        ]
        stay = fitting(layers, self.weights.dtype, keep)
        stream(layers, self.weights.__getitem__, device=device, dtype=dtype, stay=stay, ahead=self.weights.ahead)
        return stored.model

    def traceable(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return a copy of the model with fake tensors on the CPU: shapes and dtypes without data."""
        model = copy.deepcopy(self.model)
        wanted = {n: (t.shape, t.dtype if n.endswith(PACKED) else dtype) for n, t in model.state_dict().items()}
        with FakeTensorMode():
            fakes = {n: torch.empty(shape, dtype=kind) for n, (shape, kind) in wanted.items()}
        model.load_state_dict(fakes, strict=True, assign=True)
        return model.requires_grad_(False)
