"""Remap a LoRA trained on the original to the pruned model; layers that no longer exist are reported.

    remap(read(path, family), family, config, plan) -> Remapped

A layer follows what surgery did to its weight: it moved with its block, lost rows or columns, or was removed. Its scale
(alpha / rank) is multiplied into the weights, so every loader applies the same scale.

Two cases are not supported. Layers with projected modulation are reported as gone: their effect at the mean input would
be a bias, which a LoRA cannot store. And diffusers adds no LoRA to quantised weights, so load `transformer/` with it.

Notation: I inputs and O outputs of a layer, R the LoRA's rank.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.artefact.surgery import cut
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import tensor_sources

_LAYER = re.compile(r"transformer\.(?P<layer>.+?)\.(?P<matrix>lora_A|lora_B)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"transformer\.(?P<layer>.+)\.alpha")


@dataclass(frozen=True)
class Remapped:
    """A LoRA for the pruned model, with diffusers' tensor names."""

    tensors: dict[str, torch.Tensor]
    kept: dict[str, str]
    """New name by old name of each layer that still exists."""
    gone: dict[str, str]
    """Reason by old name of each layer that no longer exists."""


@dataclass(frozen=True)
class Lora:
    """The content of a LoRA file, with diffusers' tensor names."""

    tensors: dict[str, torch.Tensor]
    alpha: float | None = None
    """Alpha of the transformer's layers that have no alpha tensor. None means the layer's rank, so the scale is 1."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata that diffusers needs for the text encoders' layers."""


def read(path: Path, family: Family) -> Lora:
    """Read a LoRA file in any format that diffusers can convert.

    Raises:
        InputError: it is not safetensors, or diffusers does not accept it as a LoRA of this pipeline.
    """
    import diffusers

    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: found {path.suffix or 'no ending'}, expected a .safetensors file; pickles are not read"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            adapter = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        # FLUX's conversion consumes the alphas that already have diffusers' names.
        alphas = {name: tensor for name, tensor in tensors.items() if _ALPHA.fullmatch(name)}
        converted = alphas | getattr(diffusers, family.pipeline).lora_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error
    except (ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: not a LoRA of a {family.pipeline} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(adapter, dict):
        raise InputError(f"{path}: lora_adapter_metadata: found {type(adapter).__name__}, expected an object")
    if unknown := [n for n in converted if not n.startswith(("transformer.", "text_encoder"))]:
        raise InputError(
            f"{path}: found {unknown[0]!r}, expected names of the transformer or text encoders as in diffusers"
        )
    if not any(name.startswith("transformer.") for name in converted):
        raise InputError(f"{path}: has no layer of the transformer; it works with the pruned model unchanged")
    others = {k: v for k, v in adapter.items() if not k.startswith("transformer.")}
    return Lora(
        tensors=converted,
        alpha=_alpha(path, adapter),
        metadata={"lora_adapter_metadata": json.dumps(others)} if others else {},
    )


def _alpha(path: Path, metadata: dict[str, Any]) -> float | None:
    """Return the transformer's alpha from diffusers' metadata, or None if there is none.

    Raises:
        InputError: the metadata asks for a scale that a remapped LoRA cannot have.
    """
    fields = {k.removeprefix("transformer."): v for k, v in metadata.items() if k.startswith("transformer.")}
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        if fields.get(name):
            raise InputError(
                f"{path}: {name}: found {fields[name]!r}, which cannot be remapped; merge the LoRA instead"
            )
    alpha = fields.get("lora_alpha")
    return float(alpha) if isinstance(alpha, (int, float)) and math.isfinite(alpha) else None


def remap(lora: Lora, family: Family, config: Config, plan: PrunePlan) -> Remapped:
    """Move every layer to its place in the pruned model.

    Args:
        lora: A is (R, I), B is (O, R); layers of text encoders stay unchanged.
        config: the original transformer's.

    Raises:
        InputError: the original has no such layer, or one of another size.
    """
    shapes = family.tensor_shapes(config)
    sources = tensor_sources(family, config, plan.kept, plan.removed, plan.modulation_rank)
    places = {source.name: (name, source) for name, source in sources.items()}
    layers, alphas, out = _by_layer(lora)
    kept, gone = {}, {}
    for layer, matrices in layers.items():
        weight = f"{layer}.weight"
        a, b = matrices.get("lora_A"), matrices.get("lora_B")
        if a is None or b is None:
            raise InputError(f"{layer}: found one of lora_A and lora_B, expected both")
        if shapes.get(weight) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{layer}: found {b.shape[0]} x {a.shape[1]}, expected {shapes.get(weight, 'no such layer')}: "
                f"the LoRA is for another model"
            )
        if weight not in places:
            gone[layer] = _reason(family, config, plan, weight)
            continue
        target, source = places[weight]
        if source.projected:
            gone[layer] = "its modulation is projected"
            continue
        rank = a.shape[0]
        scale = alphas.get(layer, rank if lora.alpha is None else lora.alpha) / rank
        new = target.removesuffix(".weight")
        out[f"transformer.{new}.lora_A.weight"] = cut(a, 1, source.columns).contiguous()
        out[f"transformer.{new}.lora_B.weight"] = (cut(b, 0, source.rows) * scale).contiguous()
        kept[layer] = new
    return Remapped(tensors=out, kept=kept, gone=gone)


def _by_layer(
    lora: Lora,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float], dict[str, torch.Tensor]]:
    """Return the transformer's matrices by layer, its alphas by layer, and all other tensors by name."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    others: dict[str, torch.Tensor] = {}
    for name, tensor in lora.tensors.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["matrix"]] = tensor
        elif match := _ALPHA.fullmatch(name):
            alphas[match["layer"]] = float(tensor)
        elif name.startswith("transformer."):
            raise InputError(f"{name}: found a tensor that is neither lora_A, lora_B nor alpha")
        else:
            others[name] = tensor
    return layers, alphas, others


def _reason(family: Family, config: Config, plan: PrunePlan, weight: str) -> str:
    """Return why the pruned model has no such weight."""
    place = family.place(config, weight)
    if place is None:
        return "its layer is gone"
    block, component = place
    return f"block {block} is removed" if block in plan.blocks else f"{block}:{component} is removed"
