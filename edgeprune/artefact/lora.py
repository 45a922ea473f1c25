"""A LoRA that was made for the original, for the pruned model: layers find their new place, or are reported as gone.

    remap(read(path, family), family, config, plan) -> Remapped

What a layer became is what surgery made of it: it moved with its block, lost rows or columns of a removed part, or is
gone. Its scale (alpha / rank) goes into the weights, so that the file says the same to whoever loads it. What it leaves
out: layers whose modulation is projected, since their part at the mean input would be a bias, which a LoRA has not; and
quantised weights, to which diffusers adds no LoRA (it goes on `transformer/`).
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

_LAYER = re.compile(r"transformer\.(?P<layer>.+?)\.(?P<part>lora_A|lora_B)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"transformer\.(?P<layer>.+)\.alpha")


@dataclass(frozen=True)
class Remapped:
    """A LoRA for the pruned model, in diffusers' names."""

    tensors: dict[str, torch.Tensor]
    kept: dict[str, str]
    """New name by old name of the layers that still apply."""
    gone: dict[str, str]
    """Why, by name of the layers that do not."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file in diffusers' names."""

    tensors: dict[str, torch.Tensor]
    alpha: float | None = None
    """Of all layers of the transformer that say none themselves; None for each one's rank, which scales by 1."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What diffusers has to know of the text encoders' layers."""


def read(path: Path, family: Family) -> Lora:
    """A file, whichever trainer wrote it, as far as diffusers knows it.

    Raises:
        InputError: not safetensors, or nothing that diffusers takes for a LoRA of this pipeline.
    """
    import diffusers

    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: found {path.suffix or 'no ending'}, expected a .safetensors file; pickles are not read"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        # FLUX's conversion takes the alphas of diffusers' own names apart.
        alphas = {name: tensor for name, tensor in tensors.items() if _ALPHA.fullmatch(name)}
        found = alphas | getattr(diffusers, family.pipeline).lora_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error
    except (ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: not a LoRA of a {family.pipeline} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(said, dict):
        raise InputError(f"{path}: lora_adapter_metadata: found {type(said).__name__}, expected an object")
    if unknown := [n for n in found if not n.startswith(("transformer.", "text_encoder"))]:
        raise InputError(
            f"{path}: found {unknown[0]!r}, expected names of transformer or text encoders, as diffusers has"
        )
    if not any(name.startswith("transformer.") for name in found):
        raise InputError(f"{path}: found no layer of the transformer, so it is not changed by pruning")
    others = {k: v for k, v in said.items() if not k.startswith("transformer.")}
    return Lora(found, _alpha(path, said), {"lora_adapter_metadata": json.dumps(others)} if others else {})


def _alpha(path: Path, metadata: dict[str, Any]) -> float | None:
    """What diffusers' metadata says of the scale: alpha for every layer of the transformer."""
    said = {k.removeprefix("transformer."): v for k, v in metadata.items() if k.startswith("transformer.")}
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        if said.get(name):
            raise InputError(f"{path}: {name}: found {said[name]!r}, expected a LoRA without; merge it instead")
    alpha = said.get("lora_alpha")
    return float(alpha) if isinstance(alpha, (int, float)) and math.isfinite(alpha) else None


def remap(lora: Lora, family: Family, config: Config, plan: PrunePlan) -> Remapped:
    """Every layer at its new place.

    Args:
        lora: A is (R, I), B is (O, R); layers of text encoders stay as they are.
        config: of the original transformer.

    Raises:
        InputError: a layer that the original has not, or of another size.
    """
    shapes = family.tensor_shapes(config)
    sources = tensor_sources(family, config, plan.kept, plan.removed, plan.modulation_rank)
    places = {source.name: (name, source) for name, source in sources.items()}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in lora.tensors.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = tensor
        elif match := _ALPHA.fullmatch(name):
            alphas[match["layer"]] = float(tensor)
        elif name.startswith("transformer."):
            raise InputError(f"{name}: found a tensor that is neither lora_A, lora_B nor alpha")
        else:
            out[name] = tensor
    kept, gone = {}, {}
    for layer, parts in layers.items():
        weight, found = f"{layer}.weight", (parts.get("lora_A"), parts.get("lora_B"))
        a, b = found
        if a is None or b is None:
            raise InputError(f"{layer}: found one of lora_A and lora_B, expected both")
        if shapes.get(weight) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{layer}: found {b.shape[0]} x {a.shape[1]}, expected {shapes.get(weight, 'no such layer')}: "
                f"the LoRA is for another model"
            )
        if weight not in places:
            gone[layer] = _why(family, config, plan, weight)
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
    return Remapped(out, kept, gone)


def _why(family: Family, config: Config, plan: PrunePlan, weight: str) -> str:
    place = family.place(config, weight)
    if place is None:
        return "its layer is gone"
    block, component = place
    return f"block {block} is removed" if block in plan.blocks else f"{block}:{component} is removed"
