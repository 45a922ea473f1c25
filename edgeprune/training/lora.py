"""Training of low-rank additions to the weights, LoRA, instead of the weights: peft makes them, and they end in them.

A layer's weight W (O, I) becomes W + B A with A (R, I) and B (O, R), which starts at 0 (Hu et al., arXiv 2106.09685).
With INT4 the sum is rounded in every step, since that is what ships.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.common.extras import needs
from edgeprune.common.tensors import Tensors
from edgeprune.families.architecture import STAND_IN
from edgeprune.quantization.int4 import round_int4

_ADAPTER = "default"
_BASE, _A, _B = ".base_layer", f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add(student: Any, names: list[str], rank: int, seed: int) -> None:
    """Add low-rank matrices in float32 to linear layers, in place.

    Args:
        student: the model.
        names: of the layers.
        rank: R.
        seed: of the first values of A.

    Raises:
        MissingExtraError: peft is not installed.
    """
    with needs("train"):
        from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), student)
    for name, parameter in student.named_parameters():
        if is_low_rank(name):
            parameter.data = parameter.data.float()


def is_low_rank(name: str) -> bool:
    """Return whether a parameter of this name is one of the added matrices."""
    return ".lora_" in name


def is_trained(name: str) -> bool:
    """Return whether a parameter is trained where there are low-rank matrices: they, and all of a stand-in."""
    return is_low_rank(name) or f".{STAND_IN}." in name


def is_adapted(module: nn.Module) -> bool:
    """Return whether a layer has got such matrices."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def rounded(layer: Any, group_size: int, x: torch.Tensor) -> torch.Tensor:
    """Map x (..., I) to (..., O) by the rounded sum; the gradient goes to A and B."""
    base = layer.base_layer
    with torch.autocast(x.device.type, enabled=False):  # as `merged` adds them
        weight = base.weight.float() + layer.get_delta_weight(_ADAPTER)
    return F.linear(x, round_int4(weight, group_size).to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


def merged(state: Tensors) -> Tensors:
    """Return a state dict with the low-rank matrices added to the weights that they belong to, and without them.

    A sum with a weight in 16 bits is in half precision.
    """
    found = Tensors()
    for name, tensor in state.items():
        if is_low_rank(name):
            continue
        layer = name.removesuffix(f"{_BASE}.weight")
        if layer != name and f"{layer}{_A}" in state:
            wide = tensor.float() + state[f"{layer}{_B}"] @ state[f"{layer}{_A}"]  # alpha is the rank: no factor
            # It is stored as half: of a large model both in float32 would take more than the training.
            tensor = wide if tensor.dtype == torch.float32 else wide.half()
        found[name.replace(f"{_BASE}.", ".")] = tensor
    return found
