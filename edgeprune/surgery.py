"""Makes the shorter model: every kept tensor is copied or cut from one original tensor, the rest is gone.

Works on a reader (`name -> tensor`), so the original may be a state dict or an open safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.families.base import Source
from edgeprune.plan import PrunePlan

Read = Callable[[str], torch.Tensor]


def prune_tensor(read: Read, source: Source, mean: torch.Tensor | None) -> torch.Tensor:
    """One tensor of the shorter model. `mean` is the mean modulation input (D), needed for removed norms."""
    tensor = read(source.name)
    if source.constant:
        if mean is None:
            raise InputError(f"{source.name}: removing a norm needs the mean modulation input")
        weight = read(source.name.removesuffix("bias") + "weight")
        tensor = F.linear(mean.float(), weight.float(), tensor.float()).to(tensor.dtype)
    for axis, ranges in enumerate((source.rows, source.columns)):
        if ranges is not None:
            tensor = torch.cat([tensor.narrow(axis, a, b - a) for a, b in ranges], dim=axis)
    return tensor


def prune_state(
    family: Family, config: Config, plan: PrunePlan, read: Read, mean: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The shorter model's state dict."""
    plan.check(config, "plan")
    sources = family.tensor_sources(config, plan.kept, plan.removed)
    return {name: prune_tensor(read, source, mean).clone() for name, source in sources.items()}


def build(family: Family, config: Config, plan: PrunePlan, state: dict[str, torch.Tensor]) -> nn.Module:
    """The shorter model, filled strictly from `state`."""
    model = family.build(config, plan.kept, plan.removed)
    load_strictly(model, state)
    return model.eval()


def prune(family: Family, model: nn.Module, config: Config, plan: PrunePlan, mean: torch.Tensor | None) -> nn.Module:
    """The shorter model, made from a loaded one; the original is left as it is."""
    state = model.state_dict()
    return build(family, config, plan, prune_state(family, config, plan, state.__getitem__, mean))


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Assign a state dict in which every name and shape must fit.

    Raises:
        InputError: says the first names that do not fit.
    """
    expected: dict[str, Any] = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in state.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise InputError(
            f"weights do not fit the model: {name}: found {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    model.load_state_dict(state, strict=True, assign=True)
