"""Fake INT4 while training: the student computes with rounded weights, gradients pass straight through the rounding.

By an own `forward` of each trained layer, not by a parametrisation: names stay those of the checkpoint, and the weights
themselves stay as they are. Frozen weights are put aside for rounded ones. What it leaves out: the rounding itself, see
int4.py, and packing, see quantize.py.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.families import Family
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import precision_of
from edgeprune.training.zero import held


class Rounding:
    """Of the linear layers of a student that will be INT4."""

    def __init__(self, family: Family, student: nn.Module, group_size: int) -> None:
        self.layers: list[tuple[nn.Linear, int]] = []
        """With their group sizes. To be found before a shard takes the place of a weight."""
        self.kept: list[tuple[nn.Linear, torch.Tensor]] = []
        """Frozen layers with their weights as they were, on the CPU."""
        for name, layer in student.named_modules():
            if isinstance(layer, nn.Linear):
                precision = precision_of(family, f"{name}.weight", tuple(layer.weight.shape), group_size=group_size)
                if precision.bits == 4:
                    self.layers.append((layer, precision.group_size))

    def begin(self) -> None:
        """Compute with rounded weights. Those that are frozen are rounded once, unless this process has but a shard."""
        for layer, size in self.layers:
            if layer.weight.requires_grad or hasattr(held(layer.weight), "to_local"):
                # mypy takes methods for constants.
                layer.forward = functools.partial(_rounded, layer, size)  # type: ignore[method-assign]
            else:
                self.kept.append((layer, layer.weight.detach().cpu()))
                layer.weight.data = round_int4(layer.weight.detach(), size)

    def end(self) -> None:
        """Leave the student as it was built."""
        for layer, _ in self.layers:
            vars(layer).pop("forward", None)
        for layer, weight in self.kept:
            layer.weight.data = weight.to(layer.weight.device)
        self.kept.clear()


def _rounded(layer: nn.Linear, group_size: int, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, round_int4(layer.weight, group_size), layer.bias)
