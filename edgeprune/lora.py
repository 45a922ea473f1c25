"""A LoRA that was made for the original, for the pruned model: layers find their new place, or are reported as gone.

    remap(state, family, config, plan) -> Remapped

What a layer became is what surgery made of it: it moved with its block, lost rows or columns of a removed part, or is
gone. Its scale (alpha / rank) goes into the weights, so that the file says the same to whoever loads it. What it leaves
out: layers whose modulation is projected, since their part at the mean input would be a bias, which a LoRA has not; and
quantised weights, to which diffusers adds no LoRA (it goes on `transformer/`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.plan import PrunePlan, tensor_sources
from edgeprune.surgery import cut

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


def read(path: Path, family: Family) -> tuple[dict[str, torch.Tensor], float | None]:
    """A LoRA file in diffusers' names, whichever trainer wrote it (as far as diffusers knows it), and its own alpha.

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
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        found = getattr(diffusers, family.pipeline).lora_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error
    except (ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: not a LoRA of a {family.pipeline} ({' '.join(str(error).split())[:200]})") from error
    return found, _alpha(path, metadata)


def _alpha(path: Path, metadata: Any) -> float | None:
    """What diffusers' metadata says of the scale: alpha for every layer of the transformer."""
    said = {k.removeprefix("transformer."): v for k, v in metadata.items() if k.startswith("transformer.")}
    for field in ("alpha_pattern", "use_rslora", "use_dora"):
        if said.get(field):
            raise InputError(f"{path}: {field}: found {said[field]!r}, expected a LoRA without; merge it instead")
    alpha = said.get("lora_alpha")
    return float(alpha) if isinstance(alpha, (int, float)) and math.isfinite(alpha) else None


def remap(
    state: Mapping[str, torch.Tensor], family: Family, config: Config, plan: PrunePlan, alpha: float | None = None
) -> Remapped:
    """Every layer at its new place.

    Args:
        state: tensors by diffusers' names; A is (R, I), B is (O, R); those of text encoders stay as they are.
        config: of the original transformer.
        alpha: of all layers that say none themselves; None for each one's rank, which scales by 1.

    Raises:
        InputError: a layer that the original has not, or of another size.
    """
    shapes = family.tensor_shapes(config)
    sources = tensor_sources(family, config, plan.kept, plan.removed, plan.modulation_rank)
    places = {source.name: (name, source) for name, source in sources.items()}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
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
        scale = alphas.get(layer, rank if alpha is None else alpha) / rank
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
