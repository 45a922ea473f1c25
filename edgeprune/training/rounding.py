"""Fake INT4 quantisation in training: the student computes with rounded weights, gradients pass straight through.

Each trained layer gets a `forward` of its own instead of a parametrisation, so the checkpoint's names and the weights
themselves stay unchanged. Frozen layers hold rounded weights; their originals move to the CPU meanwhile. int4.py
rounds, quantize.py packs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.families import Family
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import precision_of
from edgeprune.training import lora
from edgeprune.training.zero import shard_of

_LARGE = 2**22
"""Numbers of a weight that is rounded again in the backward pass, so that nothing keeps its rounded copy meanwhile. A
smaller one takes longer to round than its copy is worth.
"""


class Rounding:
    """Rounding for those linear layers of a student that will be stored in INT4."""

    def __init__(self, family: Family, student: nn.Module, group_size: int) -> None:
        self.layers: list[tuple[nn.Linear, int]] = []
        """Layers with their group sizes; collected before sharding, while weights still have their shapes."""
        self.kept: list[tuple[nn.Linear, torch.Tensor]] = []
        """Frozen layers with their original weights, on the CPU."""
        self.adapted: list[tuple[nn.Module, int]] = []
        """Layers with low-rank matrices, which are rounded with them, see lora.py."""
        parts = {part for layer in student.modules() if lora.is_adapted(layer) for part in list(layer.modules())[1:]}
        for name, layer in student.named_modules():
            if layer in parts or not (isinstance(layer, nn.Linear) or lora.is_adapted(layer)):
                continue
            weight: Any = layer.weight
            precision = precision_of(family, f"{name}.weight", tuple(weight.shape), group_size=group_size)
            if precision.bits == 4 and lora.is_adapted(layer):
                self.adapted.append((layer, precision.group_size))
            elif precision.bits == 4:
                self.layers.append((layer, precision.group_size))

    def begin(self) -> None:
        """Start computing with rounded weights. Frozen weights are rounded once, unless they are sharded."""
        for layer, size in self.adapted:
            layer.forward = functools.partial(lora.rounded, layer, size)
        for layer, size in self.layers:
            if layer.weight.requires_grad or hasattr(shard_of(layer.weight), "to_local"):
                # mypy does not allow assigning to a method.
                layer.forward = functools.partial(_rounded, layer, size)  # type: ignore[method-assign]
            else:
                self.kept.append((layer, layer.weight.detach().cpu()))
                weight = layer.weight.detach()
                layer.weight.data = round_int4(weight.float(), size).to(weight.dtype)  # in 16 bits it would round twice

    def end(self) -> None:
        """Restore the student's layers and original weights."""
        for layer, _ in (*self.layers, *self.adapted):
            vars(layer).pop("forward", None)
        for layer, weight in self.kept:
            layer.weight.data = weight.to(layer.weight.device)
        self.kept.clear()


def _rounded(layer: nn.Linear, group_size: int, x: torch.Tensor) -> torch.Tensor:
    if layer.weight.numel() < _LARGE:
        return F.linear(x, round_int4(layer.weight, group_size), layer.bias)
    device = x.device.type
    bias: torch.Tensor | None = layer.bias
    if torch.is_autocast_enabled(device):  # which does not look into a function of our own
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    out: torch.Tensor = _RoundedTwice.apply(x, layer.weight, bias, group_size)  # type: ignore[no-untyped-call]
    return out


class _RoundedTwice(torch.autograd.Function):
    """A linear layer by a rounded weight, of which autograd keeps the weight alone, which is in memory anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
        ctx.size = size
        ctx.save_for_backward(x, weight)
        return F.linear(x, round_int4(weight, size).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ round_int4(weight, ctx.size).to(x.dtype) if wants_x else None,
            (rows.T @ x.flatten(0, -2)).to(weight.dtype) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
            None,
        )
