"""Read a LoRA file: what it changes in each layer of the original, with each of its tensors accounted for.

    lora = read(path, Names(family, config, encoders))

LoRA and DoRA are read, with alphas and ranks per layer, and differences of whole weights, norms and biases. The scale
(alpha / rank) is multiplied into the matrices, so every later reader applies the same scale. Adapters of other kinds
and tensors of layers that the model lacks are refused by name.

Notation: I inputs and O outputs of a layer, R the LoRA's rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.artefact.lora.names import TRANSFORMER, Names, Target
from edgeprune.artefact.lora.scales import Scales
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.tensors import Tensors
from edgeprune.families import Shape
from edgeprune.residency.weights import header

_ADAPTER = r"(?:\.\w+)?"  # PEFT's name of the adapter, such as `.default`
_ROLES = {
    "down": rf"lora_A{_ADAPTER}\.weight|lora_down\.weight|(?:lora(?:_linear_layer)?\.)?down\.weight",
    "up": rf"lora_B{_ADAPTER}\.weight|lora_up\.weight|(?:lora(?:_linear_layer)?\.)?up\.weight",
    "up_bias": rf"lora_B{_ADAPTER}\.bias",
    "bias": "diff_b|b_norm",
    "weight": "diff|w_norm",
    "magnitude": rf"dora_scale|lora_magnitude_vector{_ADAPTER}",
    "alpha": "alpha",
}
_TENSOR = re.compile(r"(?P<layer>.+?)\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in _ROLES.items()) + ")")
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {
    "LoKr": r"\.lokr_", "LoHa": r"\.hada_", "OFT": r"\.(b?oft_|oft\b)", "(IA)^3": r"\.(ia3_|on_input)",
    "GLoRA": r"\.[ab][12]\.weight$", "VeRA": r"\.vera_", "a Tucker decomposition": r"\.lora_mid\.",
    "a change of shape": r"\.(set_weight|reshape_weight)$",
}  # fmt: skip
"""Adapters that are not read, by the pattern of a tensor's name."""
_FAMILIES = {
    "FLUX": r"double_blocks|single_blocks", "SD3": "joint_blocks",
    "Stable Diffusion 1, 2 or XL": r"(input|output|down|up|mid)_blocks?[._]",
    "another model": r"(^|\.|_)(layers|blocks)[._]\d",
}  # fmt: skip
"""Whose names these are, by a pattern."""


@dataclass(frozen=True)
class Change:
    """What a file changes in one layer."""

    part: str
    """TRANSFORMER, or the folder of a text encoder."""
    layer: str
    names: tuple[str, ...]
    """The file's tensors that say so."""
    down: torch.Tensor | None = None
    """A (R, I...)."""
    up: torch.Tensor | None = None
    """B (O, R), with the scale multiplied in."""
    magnitude: torch.Tensor | None = None
    """DoRA's length of each row (O, 1) or column (1, I) of the changed weight."""
    weight: torch.Tensor | None = None
    """Difference of the whole weight."""
    bias: torch.Tensor | None = None
    """Difference of the bias (O)."""

    @property
    def key(self) -> str:
        """The layer's name, with the text encoder's before it."""
        return self.layer if self.part == TRANSFORMER else f"{self.part}.{self.layer}"


@dataclass(frozen=True)
class Lora:
    """The content of a LoRA file."""

    path: Path
    changes: tuple[Change, ...]
    tensors: int
    """How many tensors the file holds."""
    unused: dict[str, str] = field(default_factory=dict)
    """Reason by name of each tensor without effect on this model."""
    assumed: int = 0
    """Layers of PEFT's without an alpha and without the config that holds it: their scale is taken to be 1."""
    dtype: torch.dtype = torch.float32
    """Of the file's tensors."""


def read(path: Path, names: Names) -> Lora:
    """Read a file and find the layer of each of its tensors.

    Raises:
        InputError: it is not safetensors; it holds something else than LoRA, DoRA and differences; a layer or shape is
            not that of the model; or nothing in it concerns the model.
    """
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path}: found {path.suffix or 'no ending'}, expected a .safetensors file; pickles are not read"
        )
    kinds = {name: kind for name, (_, kind) in header(path).items()}
    layers = _by_layer(path, list(kinds), names.family.pipeline)
    tensors, scales = _tensors(path, kinds), Scales.of(path)
    changes: dict[tuple[str, str], Change] = {}
    unused: dict[str, str] = {}
    unknown: list[str] = []
    assumed = 0
    for layer, roles in layers.items():
        part, targets = names.find(layer)
        held = {role: tensors[name] for role, name in roles.items()}
        if part not in names.shapes:
            unused |= dict.fromkeys(roles.values(), f"the pipeline has no {part}")
        elif not targets and _is_zero(held):
            unused |= dict.fromkeys(roles.values(), "all zero, for a layer that the model lacks")
        elif not targets:
            unknown += roles.values()
        else:
            assumed += layer.startswith("base_model.") and "alpha" not in held and not scales.known(part)
            _check(path, roles, held, [names.shapes[part][f"{t.layer}.weight"] for t in targets])
            scale = scales.of_layer(part, layer, held)
            for target in targets:
                change = _cut(target, tuple(roles.values()), held, scale, names.shapes[part], len(targets))
                if twice := changes.get((change.part, change.layer)):
                    found = f"{twice.names[0]!r} and {change.names[0]!r} for one layer, {change.key}"
                    raise InputError(f"{path}: found {found}; expected a file of one adapter")
                changes[change.part, change.layer] = change
    if unknown:
        raise InputError(_unknown(path, unknown, len(tensors), names.family.pipeline))
    if not changes:
        raise InputError(f"{path}: nothing of it concerns the model: {next(iter(unused.values()), 'it is empty')}")
    stored = {kind for name, kind in kinds.items() if not name.endswith("alpha")}
    dtype = _HALF.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32
    return Lora(path, tuple(changes.values()), len(tensors), unused, assumed, dtype)


def _by_layer(path: Path, names: list[str], pipeline: str) -> dict[str, dict[str, str]]:
    """Return the names of the tensors by the layer that they name, and by role."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise InputError(f"{path}: found {_refusal(names)}, for {pipeline}")
        role = next(role for role in _ROLES if match[role] is not None)
        if (other := layers.setdefault(match["layer"], {}).setdefault(role, name)) != name:
            raise InputError(f"{path}: {name}: found {other!r} for the same layer too; expected a file of one adapter")
    return layers


def _tensors(path: Path, kinds: Mapping[str, str]) -> Tensors:
    """Read all tensors, in float32."""
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in kinds:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise InputError(f"{path}: {shown(name)}: found {kinds[name]}, expected floating point")
                tensors[name] = tensor.float()
                if not tensors[name].isfinite().all():
                    raise InputError(f"{path}: {shown(name)}: found NaN or infinity")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error
    return tensors


def _check(path: Path, roles: Mapping[str, str], held: Tensors, shapes: list[Shape]) -> None:
    """Check that tensors fit a layer that holds these weights one after the other."""
    outs, ins = sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])
    whole = (outs, *shapes[0][1:])

    def expect(role: str, fits: bool, expected: object) -> None:
        if not fits:
            raise InputError(
                f"{path}: {roles[role]}: found {tuple(held[role].shape)}, expected {expected}: "
                "the LoRA is for another model, or for another size of it"
            )

    if ("down" in held) != ("up" in held) or not held.keys() - {"alpha"}:
        found = next(iter(roles.values()))
        raise InputError(f"{path}: {found}: found only one half of a LoRA, expected lora_A and lora_B (down and up)")
    if "down" in held:
        rank = held["down"].shape[0] if held["down"].dim() else 0
        expect("down", rank > 0 and held["down"].dim() > 1 and held["down"][0].numel() == ins, f"(rank, {ins})")
        expect("up", held["up"].dim() > 1 and tuple(held["up"].flatten(1).shape) == (outs, rank), (outs, rank))
    if "alpha" in held:
        expect("alpha", held["alpha"].numel() == 1, "one number")
    if "weight" in held:
        expect("weight", held["weight"].numel() == outs * ins and held["weight"].shape[0] == outs, whole)
    for bias in {"bias", "up_bias"} & held.keys():
        expect(bias, tuple(held[bias].shape) == (outs,), (outs,))
    if "magnitude" in held:
        shape = tuple(held["magnitude"].shape)
        if "down" not in held:
            raise InputError(f"{path}: {roles['magnitude']}: found a magnitude of DoRA without its lora_A and lora_B")
        columns = shape == (1, ins) and outs != 1 and len(shapes) == 1
        by_column = f" or (1, {ins})" if len(shapes) == 1 else " (columns of fused layers cannot be told apart)"
        expect("magnitude", shape in ((outs,), (outs, 1)) or columns, f"({outs}, 1){by_column}")


def _cut(
    target: Target, names: tuple[str, ...], held: Tensors, scale: float, shapes: Mapping[str, Shape], parts: int
) -> Change:
    """Return what tensors of a file's layer change in one of its `parts` layers."""
    shape = shapes[f"{target.layer}.weight"]

    def rows(role: str) -> torch.Tensor | None:
        if role not in held:
            return None
        tensor = held[role]
        if target.rows is not None and (role != "magnitude" or tensor.shape[0] > 1):
            tensor = torch.cat([tensor[a:b] for a, b in target.rows])
        return tensor.contiguous()

    change = Change(
        target.part, target.layer, names, bias=_sum(rows("bias"), rows("up_bias"), scale), weight=rows("weight")
    )
    if change.weight is not None:
        change = replace(change, weight=change.weight.reshape(shape))
    if "down" not in held:
        return change
    up, magnitude = rows("up"), rows("magnitude")
    assert up is not None
    up, down = up.flatten(1), held["down"].flatten(1)
    if parts > 1:  # trainers that split a fused layer store it as block-diagonal: drop the ranks of other parts
        used = up.any(0)
        used[0] |= not used.any()
        up, down = up[:, used], down[used]
    if magnitude is not None and magnitude.dim() == 1:
        magnitude = magnitude[:, None]
    return replace(change, down=down.reshape(-1, *shape[1:]), up=up * scale, magnitude=magnitude)


def _sum(bias: torch.Tensor | None, up_bias: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """Return the difference of a bias: the file's, and the scaled one of B."""
    if up_bias is None:
        return bias
    return up_bias * scale if bias is None else bias + up_bias * scale


def _is_zero(held: Tensors) -> bool:
    """Return whether tensors of a layer change nothing; of half a LoRA, nobody knows."""
    changing = [held[role] for role in ("up", "up_bias", "weight", "bias") if role in held]
    return bool(changing) and not any(bool(tensor.any()) for tensor in changing)


def _refusal(names: list[str]) -> str:
    """Return what was found that is not read, and what was expected."""
    for kind, pattern in _KINDS.items():
        if found := [name for name in names if re.search(pattern, name)]:
            return (
                f"{kind} ({listed(found)}), expected LoRA or DoRA (merge it into the original with its trainer, and "
                "compress the result)"
            )
    others = [name for name in names if not _TENSOR.fullmatch(name)]
    if all(name.endswith((".weight", ".bias", ".scale")) for name in others):
        return (
            f"whole weights ({listed(others)}), expected a LoRA (those that replace weights, as Control, are not read)"
        )
    return f"{listed(others)}, expected LoRA, DoRA, or differences of weights"


def _unknown(path: Path, unknown: list[str], count: int, pipeline: str) -> str:
    """Return why tensors of unknown layers are refused."""
    whose = next((family for family, pattern in _FAMILIES.items() if re.search(pattern, unknown[0])), "no known model")
    return (
        f"{path}: {len(unknown)} of {count} tensors ({listed(unknown)}) are for layers that the model lacks; expected "
        f"a LoRA of this {pipeline}; found names of {whose}"
    )


def listed(names: list[str]) -> str:
    """Return the first two of some names, and how many follow."""
    return ", ".join(map(shown, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
