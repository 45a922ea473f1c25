"""Quantised layers with random integers, for tests of exports."""

from __future__ import annotations

import tiny
import torch
from torch import nn

from edgeprune.artefact.surgery import prune
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.quantization.precision import precision_of
from edgeprune.quantization.quantize import packed_from, round_to_nearest


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


def two_blocks() -> nn.Module:
    """Two blocks of SD3, quantised: what `quantised_onnx` is traced of."""
    return quantised(tiny.tiny_transformer(num_layers=2))


def thin(rank: int) -> nn.Module:
    """Return two blocks of projected modulation, quantised by the precision rules; one norm is removed too."""
    model = tiny.tiny_transformer(num_layers=2)
    config = {"_class_name": "SD3Transformer2DModel"} | {k: v for k, v in model.config.items() if not k.startswith("_")}
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", components="1:norm", modulation_rank=rank)
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:rank]
    out = prune(family, model, config, plan, torch.randn(64, generator=generator) / 8, basis)
    for name, layer in list(out.named_modules()):
        if isinstance(layer, nn.Linear):
            precision = precision_of(family, f"{name}.weight", tuple(layer.weight.shape))
            parent, _, leaf = name.rpartition(".")
            integers = packed_from(layer, *round_to_nearest(layer.weight.detach(), precision), precision)
            setattr(out.get_submodule(parent), leaf, integers)
    return out.requires_grad_(False)
