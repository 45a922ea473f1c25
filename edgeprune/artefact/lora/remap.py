"""Move a LoRA to the pruned model: what became of each layer, and a LoRA file for diffusers.

A layer follows what surgery did to its weight: it moved with its block, lost rows or columns, was projected, or was
removed. A projected layer's LoRA changes a bias too, which diffusers reads as the bias of B. What such a file cannot
hold, such as the difference of a norm, is refused by name: merging (merging.py) writes it into the weights.

Notation: I inputs and O outputs of a layer, R the LoRA's rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from edgeprune.artefact.lora.merging import Differences
from edgeprune.artefact.lora.names import TRANSFORMER
from edgeprune.artefact.lora.reading import Change, Lora, listed
from edgeprune.artefact.surgery import cut
from edgeprune.common.errors import InputError
from edgeprune.common.tensors import Tensors
from edgeprune.families import Config, Family, Shape, Source
from edgeprune.families.encoders import CLIP, CLIP_POOLED
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import tensor_sources


@dataclass
class Fate:
    """What became of each layer of a LoRA, and of each tensor of its file."""

    tensors: int
    """How many tensors the file holds."""
    kept: dict[str, str] = field(default_factory=dict)
    """New name by old name of each layer that is unchanged but for its place."""
    changed: dict[str, str] = field(default_factory=dict)
    """By old name of each layer that was cut or folded: what was done."""
    gone: dict[str, str] = field(default_factory=dict)
    """Reason by old name of each layer that no longer exists."""
    unused: dict[str, str] = field(default_factory=dict)
    """Reason by name of each tensor that has no effect on the original either."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many tensors were kept, changed, gone and unused; together `tensors`."""

    def count(self, lora: Lora) -> None:
        """Count the tensors: one that serves several layers is changed if they do not share one fate."""
        fates: dict[str, set[str]] = {name: {"unused"} for name in self.unused}
        for change in lora.changes:
            fate = next(f for f in ("kept", "changed", "gone") if change.key in getattr(self, f))
            for name in change.names:
                fates.setdefault(name, set()).add(fate)
        found = [next(iter(fate)) if len(fate) == 1 else "changed" for fate in fates.values()]
        self.counts = {fate: found.count(fate) for fate in ("kept", "changed", "gone", "unused")}


class Places:
    """Where the tensors of the original are in the pruned model."""

    def __init__(self, family: Family, config: Config, plan: PrunePlan) -> None:
        """Find them by what each tensor of the pruned model is made from."""
        self._family, self._config, self._plan = family, config, plan
        self.sources = tensor_sources(family, config, plan.kept, plan.removed, plan.modulation_rank)
        self._of = {source.name: (name, source) for name, source in self.sources.items() if not source.calibrated}

    def of(self, name: str) -> tuple[str, Source] | None:
        """Return new name and source of a tensor of the original; None if it is gone."""
        return self._of.get(name)

    def fates(self, lora: Lora) -> Fate:
        """Return what becomes of each layer of a LoRA that is merged."""
        fate = Fate(lora.tensors, unused=dict(lora.unused))
        for change in lora.changes:
            if change.part != TRANSFORMER:
                fate.kept[change.key] = change.key
                continue
            weight, bias = self.of(f"{change.layer}.weight"), self.of(f"{change.layer}.bias")
            if weight is not None and not (how := _how(weight[1])):
                fate.kept[change.key] = weight[0].removesuffix(".weight")
            elif weight is not None:
                fate.changed[change.key] = how
            elif bias is not None and bias[1].constant:
                fate.changed[change.key] = "constant modulation: folded into its bias"
            elif bias is not None and change.bias is not None:
                fate.changed[change.key] = "only its bias is left"
            else:
                fate.gone[change.key] = self._reason(change.layer)
        fate.count(lora)
        return fate

    def _reason(self, layer: str) -> str:
        """Return why the pruned model has no such layer."""
        place = self._family.place(self._config, f"{layer}.weight")
        if place is None:
            return "its layer is gone"
        block, component = place
        if block in self._plan.blocks:
            return f"block {block} is removed"
        removed = [name for i, name in self._plan.components if i == block]
        if component in removed or (removed and component is None):
            return ", ".join(f"{block}:{name}" for name in ([component] if component else removed)) + " is removed"
        return f"block {block} is the last one now, and nothing reads its context"


def _how(source: Source) -> str:
    """Return what was done to a weight that is left; '' for nothing."""
    cuts = [axis for axis, ranges in (("rows", source.rows), ("columns", source.columns)) if ranges is not None]
    done = [*(["modulation projected"] if source.projected else []), *([f"{' and '.join(cuts)} cut"] if cuts else [])]
    return ", ".join(done)


def remap(
    lora: Lora,
    family: Family,
    config: Config,
    plan: PrunePlan,
    mean: torch.Tensor | None = None,
    basis: torch.Tensor | None = None,
) -> tuple[Tensors, Fate]:
    """Return a LoRA for the pruned model, with diffusers' tensor names, and what became of each layer.

    Args:
        lora: what the file says.
        family: the original transformer's.
        config: the original transformer's.
        plan: what was pruned.
        mean: mean (D) of the modulation input, for projected modulation.
        basis: its basis (rank, D).

    Raises:
        InputError: a LoRA file cannot hold what is left, or nothing is left.
    """
    places = Places(family, config, plan)
    fate = places.fates(lora)
    if not any(change.part == TRANSFORMER for change in lora.changes):
        raise InputError(f"{lora.path}: has no layer of the transformer; it works with the pruned model unchanged")
    left = [change for change in lora.changes if change.key not in fate.gone]
    if not any(change.part == TRANSFORMER for change in left):
        raise InputError(f"{lora.path}: nothing of it applies: all of its {len(fate.gone)} layers are gone")
    _refuse(lora, left, family, places)
    tensors: Tensors = {}
    shapes = family.tensor_shapes(config)
    differences = Differences(lora, TRANSFORMER, shapes, tensors.__getitem__)
    for change in left:
        if change.part != TRANSFORMER:
            tensors |= _matrices(f"{change.part}.{_in_clip(change.layer)}", change, None)
            continue
        weight, bias = places.of(f"{change.layer}.weight"), places.of(f"{change.layer}.bias")
        assert weight is not None
        moved = _moved(change, shapes[f"{change.layer}.weight"], weight[1], basis)
        difference = differences.pruned(bias[1], mean, basis) if bias else None
        tensors |= _matrices(f"{TRANSFORMER}.{weight[0].removesuffix('.weight')}", moved, difference)
    if any(name.endswith(".lora_B.bias") for name in tensors):  # PEFT then expects one of every layer
        for name in [n for n in tensors if n.startswith(f"{TRANSFORMER}.") and n.endswith(".lora_B.weight")]:
            tensors.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(len(tensors[name])))
    return {name: tensor.to(lora.dtype).contiguous() for name, tensor in tensors.items()}, fate


def _refuse(lora: Lora, left: list[Change], family: Family, places: Places) -> None:
    """Refuse changes that a LoRA file cannot hold, as diffusers and PEFT read it.

    Raises:
        InputError: there are some; names them by reason.
    """
    kinds = {encoder.name: encoder.kind for encoder in family.encoders}
    dora = {change.magnitude is not None for change in left if change.part == TRANSFORMER}
    refused: dict[str, list[str]] = {}
    for change in left:
        weight = places.of(f"{change.layer}.weight")
        if change.part != TRANSFORMER and kinds.get(change.part) not in (CLIP, CLIP_POOLED):
            why = f"layers of {change.part}"
        elif change.weight is not None:
            why = "differences of norms" if change.weight.dim() == 1 else "differences of whole weights"
        elif change.part != TRANSFORMER and (change.bias is not None or change.magnitude is not None):
            why = f"biases and DoRA of {change.part}"
        elif change.part == TRANSFORMER and weight is None:
            why = "layers of which only the bias is left"
        elif len(dora) > 1 and change.magnitude is None and change.part == TRANSFORMER:
            why = "layers without DoRA among others with it"
        elif True in dora and change.bias is not None:
            why = "biases beside DoRA"
        elif change.magnitude is not None and not (_by_row(change) and weight and _whole_rows(weight[1])):
            why = "DoRA of columns, or of layers that lost columns"
        else:
            continue
        refused.setdefault(why, []).extend(change.names)
    if refused:
        raise InputError(
            f"{lora.path}: a LoRA file for diffusers cannot hold "
            + "; ".join(f"{why} ({listed(names)})" for why, names in refused.items())
            + ": add --merge to write the whole LoRA into the weights"
        )


def _by_row(change: Change) -> bool:
    return change.magnitude is not None and change.magnitude.shape[1] == 1


def _whole_rows(source: Source) -> bool:
    return source.columns is None and not source.projected


def _moved(change: Change, shape: Shape, source: Source, basis: torch.Tensor | None) -> Change:
    """Return a layer's matrices as surgery leaves them; of a layer that changes only its bias, zeros of rank 1."""
    down, up = change.down, change.up
    if down is None or up is None:
        down, up = torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1)
    if source.projected:
        if basis is None:
            raise InputError("projected modulation needs the basis of the modulation input")
        down = down @ basis.float().T
    magnitude = None if change.magnitude is None else cut(change.magnitude, 0, source.rows)
    return replace(change, down=cut(down, 1, source.columns), up=cut(up, 0, source.rows), magnitude=magnitude)


def _matrices(layer: str, change: Change, bias: torch.Tensor | None) -> Tensors:
    """Return a layer's tensors under diffusers' names."""
    assert change.down is not None and change.up is not None
    up = change.up.reshape(*change.up.shape, *[1] * (change.down.dim() - 2))
    tensors = {f"{layer}.lora_A.weight": change.down, f"{layer}.lora_B.weight": up}
    if change.magnitude is not None:
        tensors[f"{layer}.lora_magnitude_vector"] = change.magnitude.flatten()
    if bias is not None:
        tensors[f"{layer}.lora_B.bias"] = bias
    return tensors


def _in_clip(layer: str) -> str:
    """Return the name of a CLIP layer in LoRA files, which begins as in older versions of transformers."""
    return layer if layer.startswith("text_model.") or not layer.startswith("encoder.") else f"text_model.{layer}"
