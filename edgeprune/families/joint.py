"""What families have in common whose blocks are diffusers' joint blocks: two streams, one attention, adaLN."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST
from edgeprune.families.base import WHERE, Config, Producer, ScalingGroup, Shape, Swap, whole

if TYPE_CHECKING:
    import torch
    from torch import nn

COMPONENT_OF = {
    "norm1": "norm", "norm1_context": "context_norm", "attn": "attn", "attn2": "attn2",
    "ff": "mlp", "ff_context": "context_mlp",
}  # fmt: skip
"""Component by the name of its module."""
_MODULE_OF = {component: module for module, component in COMPONENT_OF.items()}
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def linear(name: str, out: int, inp: int) -> dict[str, Shape]:
    """Shapes of a linear layer with bias."""
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def width(config: Config) -> int:
    """D.

    Raises:
        InputError: heads or their width are no such numbers, or too many.
    """
    heads, head = whole(config, "num_attention_heads"), whole(config, "attention_head_dim")
    if heads * head > LARGEST:
        raise InputError(f"{WHERE}: num_attention_heads: found {heads} of {head}, expected a width up to {LARGEST}")
    return heads * head


def swaps(block: Any, component: str, mean: torch.Tensor | None) -> list[Swap]:
    """What takes a component out of a joint block; nothing where the block does not have it."""
    from edgeprune.families.removed import ConstantModulation, NoBranch

    module = _MODULE_OF[component]
    if getattr(block, module, None) is None:
        return []
    if component in ("norm", "context_norm"):
        norm = getattr(block, module)
        return [Swap(norm, "linear", ConstantModulation(norm.linear, mean))]
    return [Swap(block, module, NoBranch(2 if component == "attn" else 1))]


def attention(block: nn.Module) -> nn.Module | None:
    """A block's joint attention; what stands for a removed one has no weights."""
    found: nn.Module | None = getattr(block, "attn", None)
    return found if found is not None and any(True for _ in found.parameters()) else None


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """A block's linear layers by name."""
    from torch import nn

    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def modulated(
    layers: dict[str, nn.Linear], d: int, norm: str, members: Sequence[tuple[int, str]], *, scale_first: bool = False
) -> list[ScalingGroup]:
    """Layers that read what an adaLN makes: by the part of the modulation where its shift (or scale) is."""
    groups: list[ScalingGroup] = []
    if norm not in layers:
        return groups
    for part, names in members:
        consumers = tuple(n for n in names.split() if n in layers)
        if consumers and (part + 2) * d <= layers[norm].out_features:
            shift, scale = (part + 1, part) if scale_first else (part, part + 1)
            producers = (
                Producer(norm, (shift * d, (shift + 1) * d)),
                Producer(norm, (scale * d, (scale + 1) * d), one_plus=True),
            )
            groups.append(ScalingGroup(consumers, producers))
    return groups


def attended(layers: dict[str, nn.Linear], d: int, attention: str) -> list[ScalingGroup]:
    """Output projections, which read the averaged values of both streams."""
    consumers = tuple(n for n in (f"{attention}.to_out.0", f"{attention}.to_add_out") if n in layers)
    values = [n for n in (f"{attention}.to_v", f"{attention}.add_v_proj") if n in layers]
    return [ScalingGroup(consumers, tuple(Producer(n, (0, d)) for n in values))] if consumers else []


def joint_groups(block: nn.Module) -> list[ScalingGroup]:
    """The scaling groups of a joint block: what reads each adaLN output, and attention's output projections."""
    layers = linears(block)
    (d,) = cast("Any", block).norm1.norm.normalized_shape
    # Parts of the modulation by position: shift, scale, gate of attention; of the MLP; of the second attention.
    image = ((0, "attn.to_q attn.to_k attn.to_v"), (3, "ff.net.0.proj"), (6, "attn2.to_q attn2.to_k attn2.to_v"))
    context = ((0, "attn.add_q_proj attn.add_k_proj attn.add_v_proj"), (3, "ff_context.net.0.proj"))
    # AdaLayerNormContinuous of SD3's last block: scale, shift.
    last = "norm1_context.linear" in layers and layers["norm1_context.linear"].out_features == 2 * d
    return [
        *modulated(layers, d, "norm1.linear", image),
        *modulated(layers, d, "norm1_context.linear", context, scale_first=last),
        *attended(layers, d, "attn"),
        *attended(layers, d, "attn2"),
    ]
