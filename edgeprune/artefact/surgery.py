"""Make the shorter model: each of its tensors is copied, cut or projected from one tensor of the original.

A projected modulation layer reads R coordinates of its input x instead of x: those of x - m on a basis P (R, D) with
orthonormal rows, where m is the mean input. W x + b becomes (W P^T)(P (x - m)) + (W m + b), which is exact if x - m
lies in the span of the basis. The original is read through a function (`name -> tensor`), so it may be a state dict or
an open safetensors file.

Notation: D width, R modulation rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family, Source
from edgeprune.families.removed import ConstantEmbedding, ConstantModulation, ProjectedEmbedding
from edgeprune.families.stand_in import put_before
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width, streams_of, tensor_sources

Read = Callable[[str], torch.Tensor]


def prune_tensor(
    read: Read, source: Source, mean: torch.Tensor | None, basis: torch.Tensor | None = None
) -> torch.Tensor:
    """Return one tensor of the shorter model.

    Args:
        mean: mean modulation input (D), needed for removed norms and projected modulation.
        basis: basis (R, D), needed for projected modulation.

    Raises:
        InputError: the tensor needs one of them and it is None.
    """

    def calibrated(name: str) -> torch.Tensor:
        value = {"mean": mean, "basis": basis}[name]
        if value is None:
            raise InputError(f"{source.name}: removed or projected modulation needs the {name} of the modulation input")
        return value.float()

    if source.calibrated:
        return calibrated(source.name)
    tensor = read(source.name)
    if source.projected:
        tensor = (tensor.float() @ calibrated("basis").T).to(tensor.dtype)
    if source.constant:
        weight = read(source.name.removesuffix("bias") + "weight")
        tensor = F.linear(calibrated("mean"), weight.float(), tensor.float()).to(tensor.dtype)
    return cut(cut(tensor, 0, source.rows), 1, source.columns)


def cut(tensor: torch.Tensor, axis: int, ranges: Sequence[tuple[int, int]] | None) -> torch.Tensor:
    """Return a tensor with only these ranges of an axis, in this order; None keeps all."""
    return tensor if ranges is None else torch.cat([tensor.narrow(axis, a, b - a) for a, b in ranges], dim=axis)


def prune_state(
    family: Family,
    config: Config,
    plan: PrunePlan,
    read: Read,
    mean: torch.Tensor | None,
    basis: torch.Tensor | None = None,
    stand_ins: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Return the shorter model's state dict; `mean` and `basis` as for `prune_tensor`.

    Args:
        stand_ins: the tensors of its stand-ins, by their names in it.

    Raises:
        InputError: the plan is for another model, or needs a mean or basis that is None.
    """
    plan.check(config, "plan")
    sources = tensor_sources(family, config, plan.kept, plan.removed, plan.modulation_rank)
    return {name: prune_tensor(read, source, mean, basis).clone() for name, source in sources.items()} | dict(stand_ins)


def structure(family: Family, config: Config, plan: PrunePlan) -> nn.Module:
    """Return the shorter model on the meta device, ready for a strict state dict."""
    model = family.build(config, plan.kept, plan.removed)
    if plan.modulation_rank is not None:
        with torch.device("meta"):
            _project(family, model, plan.modulation_rank, modulation_width(family, config))
    blocks = family.blocks(model)
    for new in plan.stand_ins:
        with torch.device("meta"):
            streams, rank = streams_of(family, config, plan.kept[new]), plan.stand_in_rank or 0
            put_before(blocks[new], streams, family.width(config), rank)
    return model


def _project(family: Family, model: nn.Module, rank: int, width: int) -> None:
    """Replace in place the modulation layers by ones that read R coordinates instead of the modulation input (D)."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not family.modulates(f"{name}.weight"):
            continue
        path, _, attribute = name.rpartition(".")
        norm = model.get_submodule(path)
        for child, module in list(norm.named_children()):
            if isinstance(module, nn.SiLU):  # now applied by the embedding, before the projection
                setattr(norm, child, nn.Identity())
        thin = nn.Linear(rank, layer.out_features) if rank else ConstantModulation(layer, None)
        setattr(norm, attribute, thin)
    embedder = model.get_submodule(family.embedder)
    setattr(model, family.embedder, ProjectedEmbedding(embedder, rank, width) if rank else ConstantEmbedding())


def build(family: Family, config: Config, plan: PrunePlan, state: dict[str, torch.Tensor]) -> nn.Module:
    """Return the shorter model with the weights of `state`, which must fit exactly.

    Raises:
        InputError: a name or shape does not fit.
    """
    model = structure(family, config, plan)
    load_strictly(model, state)
    return model.eval()


def prune(
    family: Family,
    model: nn.Module,
    config: Config,
    plan: PrunePlan,
    mean: torch.Tensor | None,
    basis: torch.Tensor | None = None,
    stand_ins: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> nn.Module:
    """Return the shorter model of a loaded one, which stays unchanged; the other arguments as for `prune_state`."""
    state = model.state_dict()
    return build(family, config, plan, prune_state(family, config, plan, state.__getitem__, mean, basis, stand_ins))


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Assign a state dict to a model; every name and shape must fit.

    Raises:
        InputError: one does not; names the first.
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
