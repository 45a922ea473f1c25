"""What families share whose blocks are diffusers' joint blocks: two streams, one attention, adaLN."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, shown
from edgeprune.families.architecture import WHERE, Config, Shape, config_number
from edgeprune.families.surgery import Swap

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


def known_fields(network: type, config: Config) -> Config:
    """Return the fields of a config that a class of diffusers has; it ignores the others when it loads a model."""
    known = inspect.signature(network).parameters
    return {name: value for name, value in config.items() if name in known}


def check_axes(config: Config, default: tuple[int, ...]) -> None:
    """Check `axes_dims_rope`, the numbers of each head by position axis.

    Raises:
        InputError: they are not as many even numbers as there are axes, or are not a whole head.
    """
    axes, head = config.get("axes_dims_rope", default), config_number(config, "attention_head_dim")
    even = isinstance(axes, (list, tuple)) and all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
    if not even or len(axes) != len(default) or sum(axes) != head:
        expected = f"{len(default)} even numbers with the sum {head}, attention_head_dim"
        raise InputError(f"{WHERE}: axes_dims_rope: found {shown(axes)}, expected {expected}")


def linear(name: str, out: int, inp: int) -> dict[str, Shape]:
    """Return the shapes of a linear layer with bias."""
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def width(config: Config) -> int:
    """Return D, the number of heads times their width.

    Raises:
        InputError: one of the two is not a valid number, or their product is too large.
    """
    heads, head = config_number(config, "num_attention_heads"), config_number(config, "attention_head_dim")
    if heads * head > LARGEST:
        raise InputError(f"{WHERE}: num_attention_heads: found {heads} of {head}, expected a width up to {LARGEST}")
    return heads * head


def swaps(block: Any, component: str, mean: torch.Tensor | None) -> list[Swap]:
    """Return the swaps that take a component out of a joint block; empty if the block lacks it.

    `mean` (D) is the mean modulation input; None for a model on the meta device, whose weights load later.
    """
    from edgeprune.families.removed import ConstantModulation, NoBranch

    module = _MODULE_OF[component]
    if getattr(block, module, None) is None:
        return []
    if component in ("norm", "context_norm"):
        norm = getattr(block, module)
        return [Swap(owner=norm, attribute="linear", replacement=ConstantModulation(norm.linear, mean))]
    return [Swap(owner=block, attribute=module, replacement=NoBranch(2 if component == "attn" else 1))]


def take_out(block: Any, components: Iterable[str]) -> None:
    """Take components out of a joint block on the meta device, in place."""
    for component in components:
        for swap in swaps(block, component, None):
            setattr(swap.owner, swap.attribute, swap.replacement)


def attention(block: nn.Module) -> nn.Module | None:
    """Return a block's `attn`, or None if it was removed: its replacement has no weights."""
    module: nn.Module | None = getattr(block, "attn", None)
    return module if module is not None and any(True for _ in module.parameters()) else None
