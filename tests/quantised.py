"""Quantised layers with random integers, for tests of exports."""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.quantization.int4 import PackedLinear, pack


def packed(layer: nn.Linear, bits: int, group_size: int, generator: torch.Generator) -> PackedLinear:
    """Random integers over the whole range, scales of both signs."""
    low = -(2 ** (bits - 1))
    shape = (layer.out_features, layer.in_features)
    out = PackedLinear(shape[1], shape[0], bits=bits, group_size=group_size, bias=layer.bias is not None)
    out.weight_packed.copy_(pack(torch.randint(low, -low, shape, generator=generator), bits))
    out.weight_scale.copy_(torch.randn(out.weight_scale.shape, generator=generator) * 0.2 / -low)
    if layer.bias is not None:
        out.bias.copy_(layer.bias.detach())
    return out


def quantised(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks become PackedLinear: modulation INT8 in groups of 16, others INT4 of 32."""
    generator = torch.Generator().manual_seed(5)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks"):
            bits, group = (8, 16) if "norm1" in name else (4, 32)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed(layer, bits, group, generator))
    return model
