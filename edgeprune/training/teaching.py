"""Saving memory in training: a teacher in lower precision, and checkpointed activations.

`int8` stores the linear layers of blocks with one symmetric scale per output, in the checkpoint's own packed layer.
`bf16` stores all weights. parallel.py offloads or shards the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgeprune.families import Family
from edgeprune.quantization.int4 import PackedLinear, pack


@torch.no_grad()
def lower(family: Family, teacher: Any, precision: str) -> None:
    """Convert a teacher's weights to `bf16` or `int8` in place; `float32` changes nothing."""
    if precision == "bf16":
        nn.Module.to(teacher, torch.bfloat16)  # diffusers' own `to` warns of float32 modules even if there are none
    elif precision == "int8":
        layers = [
            (name, layer)
            for name, layer in teacher.named_modules()
            if isinstance(layer, nn.Linear) and family.in_block(f"{name}.weight")
        ]
        for name, layer in layers:
            owner, _, attribute = name.rpartition(".")
            setattr(teacher.get_submodule(owner), attribute, _int8(layer))


def _int8(layer: nn.Linear) -> PackedLinear:
    size, weight = layer.in_features, layer.weight
    out = PackedLinear(size, layer.out_features, bits=8, group_size=size, bias=layer.bias is not None)
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
    out.weight_scale = scale
    out.weight_packed = pack((weight / scale.float()).round().clamp(-127, 127), 8)
    if layer.bias is not None:
        out.bias = layer.bias.detach().half()
    return out.to(weight.device)


def checkpoint_activations(student: Any) -> None:
    """Recompute the activations of blocks that gradients pass through; frozen blocks before them store none anyway."""
    student.enable_gradient_checkpointing(_checkpointed)


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    reached = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    if reached or any(p.requires_grad for p in block.parameters()):
        return checkpoint(block.__call__, *args, use_reentrant=False)
    return block(*args)
