"""LoRAs of tiny models as trainers write them, and the original with a LoRA, computed here by the formulas alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import config_of

from edgeprune.artefact.lora.names import Names
from edgeprune.artefact.lora.reading import Lora, read
from edgeprune.families import family_of

RANK, ALPHA = 4, 3.0
Tensors = dict[str, torch.Tensor]


def names_of(model: Any, encoders: dict[str, dict[str, tuple[int, ...]]] | None = None) -> Names:
    """Return the names of a loaded transformer's layers."""
    config = config_of(model)
    return Names(family_of(config), config, encoders or {})


def read_tensors(folder: Path, tensors: Tensors, names: Names, metadata: dict[str, str] | None = None) -> Lora:
    """Write a file and read it."""
    save_file(tensors, folder / "lora.safetensors", metadata)
    return read(folder / "lora.safetensors", names)


def pair(layer: str, outs: int, ins: int, *, rank: int = RANK, seed: int = 0, alpha: float | None = ALPHA) -> Tensors:
    """Return one layer's LoRA with kohya's suffixes."""
    g = torch.Generator().manual_seed(seed)
    out = {
        f"{layer}.lora_down.weight": torch.randn(rank, ins, generator=g) / 4,
        f"{layer}.lora_up.weight": torch.randn(outs, rank, generator=g) / 4,
    }
    return out if alpha is None else out | {f"{layer}.alpha": torch.tensor(alpha)}


def everything(model: Any, *, bias: bool = False, norms: bool = False, dora: bool = False) -> Tensors:
    """Return a LoRA on every linear layer under diffusers' names, each with another rank and alpha.

    Args:
        model: a loaded transformer.
        bias: also change the biases of layers that have one.
        norms: also change the norms of queries and keys.
        dora: with magnitudes.
    """
    out: Tensors = {}
    for seed, (name, layer) in enumerate(model.named_modules()):
        key = f"transformer.{name}"
        if isinstance(layer, torch.nn.Linear):
            made = pair(key, *layer.weight.shape, rank=1 + seed % 3, seed=seed, alpha=0.5 + seed % 4)
            if bias and layer.bias is not None:
                made[f"{key}.diff_b"] = torch.randn(len(layer.bias), generator=torch.Generator().manual_seed(seed)) / 4
            if dora:
                long = layer.weight.detach().norm(dim=1)
                made[f"{key}.dora_scale"] = (long * (1 + (seed % 5) / 10))[:, None]
            out |= made
        elif norms and type(layer).__name__ == "RMSNorm" and "norm_" in name:
            out[f"{key}.diff"] = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) / 4
    return out


def merged(state: Tensors, lora: Tensors) -> Tensors:
    """Return the original with a LoRA of `everything`, by the formulas of LoRA and DoRA."""
    out = dict(state)
    for name, tensor in lora.items():
        layer, _, role = name.removeprefix("transformer.").partition(".lora_") if ".lora_" in name else (name, "", "")
        if role == "down.weight":
            up, alpha = lora[f"transformer.{layer}.lora_up.weight"], lora[f"transformer.{layer}.alpha"]
            weight = state[f"{layer}.weight"] + up @ tensor * alpha / len(tensor)
            if (magnitude := lora.get(f"transformer.{layer}.dora_scale")) is not None:
                weight = weight / weight.norm(dim=1, keepdim=True) * magnitude
            out[f"{layer}.weight"] = weight
        elif name.endswith(".diff_b"):
            bias = name.removeprefix("transformer.").removesuffix("diff_b") + "bias"
            out[bias] = state[bias] + tensor
        elif name.endswith(".diff"):
            weight_name = name.removeprefix("transformer.").removesuffix("diff") + "weight"
            out[weight_name] = state[weight_name] + tensor
    return out


def applied(state: Tensors, lora: Tensors) -> Tensors:
    """Return the pruned model's weights with a LoRA file's, as PEFT applies it with scale 1."""
    out = dict(state)
    for name, up in lora.items():
        if not name.endswith(".lora_B.weight") or not name.startswith("transformer."):
            continue
        layer, key = (
            name.removesuffix(".lora_B.weight").removeprefix("transformer."),
            name.removesuffix("lora_B.weight"),
        )
        weight, down = state[f"{layer}.weight"], lora[f"{key}lora_A.weight"]
        weight = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if (magnitude := lora.get(f"{key}lora_magnitude_vector")) is not None:
            weight = weight / weight.norm(dim=1, keepdim=True) * magnitude[:, None]
        out[f"{layer}.weight"] = weight
        if (bias := lora.get(f"{key}lora_B.bias")) is not None and f"{layer}.bias" in out:
            out[f"{layer}.bias"] = out[f"{layer}.bias"] + bias
    return out
