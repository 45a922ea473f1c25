"""INT4 weights: NNCF chooses the steps, one block at a time, and `PackedLinear` layers store the integers.

precision.py says how many bits each tensor gets. With calibration inputs, feedback.py
chooses the integers over NNCF's steps; without, they are the nearest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.common import heap
from edgeprune.common.errors import InputError
from edgeprune.families import Architecture, Family, Shape
from edgeprune.quantization import feedback
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.quantization.precision import Precision, precision_of
from edgeprune.residency.running import least_bytes

CALIBRATIONS = ("none", "feedback")
_BATCH = 2**24
"""Most weights that one call of NNCF gets."""
_HALF_STEP = 16 / 15
"""How much larger than 1/8 of it a step must be for a group's largest weight to be 7.5 steps."""


def rounding_bytes(numbers: int, itemsize: int) -> int:
    """Return the bytes that a weight of so many numbers takes while it is rounded, beside itself.

    It is there in float32, scaled, and as integers in 32 bits.

    Args:
        numbers: of the weight.
        itemsize: bytes of each before it is rounded.
    """
    return numbers * (3 * 4 - (itemsize if itemsize == 4 else 0))


def feedback_bytes(shapes: Sequence[Shape], stored: int, computed: int, activations: int = 0) -> int:
    """Return the bytes of a block that NNCF scales, that then runs, and is rounded with the moments of its inputs.

    Args:
        shapes: of its tensors.
        stored: bytes of a weight in the file.
        computed: bytes of a weight as it computes.
        activations: bytes that it needs at least while it runs.
    """
    sizes = [math.prod(shape) for shape in shapes]
    scaled = least_bytes(sizes, 0, stored, computed, rounding_bytes(max(sizes), computed))
    working = max(activations, feedback.working_bytes(shapes))
    packed = sum(sizes)  # of INT4, half a byte each: of this block, and of one that waits to be written
    return packed + max(scaled, least_bytes(sizes, 0, stored, computed, working) + feedback.moments_bytes(shapes))


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return a module's linear layers by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a submodule by `layer`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, layer)


def packed_from(linear: nn.Linear, values: torch.Tensor, scale: torch.Tensor, precision: Precision) -> PackedLinear:
    """Build a `PackedLinear` from integers (O, I) and scales (O, groups), with the bias of `linear`."""
    layer = PackedLinear(
        linear.in_features, linear.out_features, bits=precision.bits, group_size=precision.group_size,
        bias=linear.bias is not None,
    )  # fmt: skip
    layer.weight_packed.copy_(pack(values, precision.bits))
    layer.weight_scale.copy_(scale)
    if linear.bias is not None:
        assert layer.bias is not None
        layer.bias.copy_(linear.bias.detach())
    return layer


def round_to_nearest(weight: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Round symmetrically, for 8-bit layers: return integers (O, I) and scales (O, groups) in half precision."""
    limit = 2 ** (precision.bits - 1) - 1
    groups = weight.float().view(weight.shape[0], -1, precision.group_size)
    scale = (groups.abs().amax(-1) / limit).clamp_min(1e-7).half()
    values = (groups / scale.float()[..., None]).round().clamp(-limit - 1, limit)
    return values.view_as(weight), scale


def _packed_nearest(linear: nn.Linear, precision: Precision) -> PackedLinear:
    """Round a layer to the nearest integers, without NNCF."""
    values, scale = round_to_nearest(linear.weight.detach(), precision)
    return packed_from(linear, values, scale, precision)


def prepare(family: Architecture, module: nn.Module, *, prefix: str = "", group_size: int = 64) -> nn.Module:
    """Insert empty `PackedLinear` layers where the rule asks for them, in place, to load a quantised state dict.

    Args:
        family: the transformer's family.
        module: a transformer, or one of its blocks.
        prefix: name prefix of the block's tensors.
        group_size: weights that share a scale.
    """
    for name, linear in linear_layers(module).items():
        p = precision_of(family, f"{prefix}{name}.weight", tuple(linear.weight.shape), group_size=group_size)
        if p.bits < 16:
            replace(module, name, empty_packed(linear, p))
    return module


def empty_packed(linear: nn.Linear, precision: Precision) -> PackedLinear:
    """Return a `PackedLinear` without numbers, on the device of `linear`."""
    with torch.device(linear.weight.device):
        return PackedLinear(
            linear.in_features, linear.out_features, bits=precision.bits, group_size=precision.group_size,
            bias=linear.bias is not None,
        )  # fmt: skip


class _Linears(nn.Module):
    """Parallel linear layers of one group size, the module that NNCF compresses. Inputs and outputs are by position."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        # NNCF attaches its statistics to the operation that produces a layer's input, so there must be one.
        return [layer(x * 1.0) for layer, x in zip(self.layers, inputs, strict=True)]


def _nncf_integers(weights: list[torch.Tensor], group_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return integers (O, I) and scales (O, groups) of each weight (O, I), chosen by NNCF.

    NNCF gets the layers in parallel instead of inside their block, so tracing needs no example of the block's inputs.
    """
    # NNCF sends telemetry on every call, from a forked process; `NNCF_CI=1` turns it off.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    with _quiet():
        compressed: Any = nncf.compress_weights(
            _Linears(weights).eval(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=group_size, all_layers=True,
            dataset=nncf.Dataset([tuple(torch.ones(1, w.shape[1]) for w in weights)]),  # NNCF traces with it
        )  # fmt: skip
    state = compressed.state_dict()
    out = []
    for index, weight in enumerate(weights):
        packed = state[f"layers.{index}.weight"]
        scale = next(v for k, v in state.items() if f"layers:{index}:weight__" in k and k.endswith("_scale"))
        pairs = torch.stack([packed & 0xF, packed >> 4], dim=-1)
        values = (pairs.flatten().to(torch.int8) - 8).view(weight.shape)
        out.append(_positive(weight, values, scale.reshape(weight.shape[0], -1)))
    return out


def _positive(weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the groups with a negative scale a positive one, which is all that TensorRT accepts; the others stay.

    NNCF maps a group's largest weight to -8 steps, with a negative scale if the weight is positive. With a positive one
    it would be 8 steps, which there are not. So such a group takes a step with which it is 7.5, and is rounded again.

    Args:
        weight: the weight (O, I).
        values: NNCF's integers (O, I).
        scale: NNCF's scales (O, groups).
    """
    groups = weight.float().reshape(*scale.shape, -1)
    larger = (scale.abs().float() * _HALF_STEP).half()
    rounded = (groups / larger.float().clamp_min(1e-12)[..., None]).round().clamp(-8, 7).to(values.dtype)
    negative = scale < 0
    out = torch.where(negative[..., None], rounded, values.reshape(groups.shape))
    return out.reshape(weight.shape), torch.where(negative, larger, scale.half())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide NNCF's tables and progress bars; edgeprune shows its own bar."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def quantize_part(
    family: Family,
    model: nn.Module,
    block: int | None,
    *,
    group_size: int = 64,
    calibration: str = "none",
    run: Callable[[], None] | None = None,
    calls: int = 1,
) -> None:
    """Quantise the linear layers of one block, or for None those outside the blocks, in place.

    Without calibration only this part of the model needs weights.

    Args:
        family: the model's family.
        model: the transformer.
        block: the block's index; earlier blocks are already quantised.
        group_size: weights that share a scale.
        calibration: `none`, or `feedback` of rounding errors, which needs `run`.
        run: runs the model on calibration inputs, so that hooks see the layers' inputs.
        calls: how often `run` calls each layer.
    """
    if block is None:
        outside = {n: m for n, m in linear_layers(model).items() if not family.in_block(n)}
        for name, linear in outside.items():
            p = precision_of(family, f"{name}.weight", tuple(linear.weight.shape), group_size=group_size)
            replace(model, name, _packed_nearest(linear, p))
        return
    module, prefix = family.blocks(model)[block], family.block_prefix(model, block)
    rule = {
        n: precision_of(family, f"{prefix}{n}.weight", tuple(m.weight.shape), group_size=group_size)
        for n, m in linear_layers(module).items()
    }
    measure = None
    if calibration == "feedback" and run is not None:
        measure = partial(feedback.second_moments, run=run, calls=calls)
    try:
        round_layers(module, rule, measure)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def round_layers(
    module: nn.Module,
    rule: Mapping[str, Precision],
    measure: Callable[[dict[str, nn.Linear]], dict[str, list[torch.Tensor]]] | None = None,
) -> None:
    """Replace linear layers by `PackedLinear`, in place: NNCF's steps, with the integers that feedback chooses.

    NNCF is done before moments are measured: both take several times the memory of a layer.

    Args:
        module: holds them.
        rule: 4 or 8 bits of each, by name; 8 bits are rounded to the nearest.
        measure: returns the moments of layers' inputs, see feedback.py; layers without get the nearest integers. None
            for the nearest integers of all.

    Raises:
        InputError: see `second_moments`.
    """
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in rule}
    by_group: dict[int, list[str]] = {}
    for name in (name for name, p in rule.items() if p.bits == 4):
        by_group.setdefault(rule[name].group_size, []).append(name)
    steps: dict[str, torch.Tensor] = {}
    for group, names in by_group.items():
        for batch in _batches({n: layers[n].weight.numel() for n in names}):
            weights = [layers[n].weight.detach() for n in batch]
            for name, (values, scale) in zip(batch, _integers(weights, group), strict=True):
                if measure:
                    steps[name] = scale
                else:
                    replace(module, name, packed_from(layers.pop(name), values, scale, rule[name]))
            del weights, values
    heap.trim()  # what NNCF took: a third of a GB of a block of SD3.5 Large
    moments = measure(linear_layers(module)) if measure else {}
    for sharing in _sharing(moments, steps):
        parts = feedback.rounded([(layers[n].weight, steps[n]) for n in sharing], moments[sharing[0]])
        for name, values in zip(sharing, parts, strict=True):
            del moments[name]
            replace(module, name, packed_from(layers.pop(name), values, steps[name], rule[name]))
    for name in list(layers):  # of 8 bits, or nothing ran them
        linear = layers.pop(name)
        if rule[name].bits == 4:
            ((values, scale),) = _integers([linear.weight.detach()], rule[name].group_size)
            replace(module, name, packed_from(linear, values, scale, rule[name]))
        else:
            replace(module, name, _packed_nearest(linear, rule[name]))


def _sharing(moments: Mapping[str, list[torch.Tensor]], names: Iterable[str]) -> list[list[str]]:
    """Group layers by the list of moments that they share, see `second_moments`."""
    found: dict[int, list[str]] = {}
    for name in (name for name in names if name in moments):
        found.setdefault(id(moments[name]), []).append(name)
    return list(found.values())


def _integers(weights: list[torch.Tensor], group_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what `_nncf_integers` does; a weight above _BATCH goes to NNCF some rows at a time, which is equal."""
    (first, *others), rows = weights, max(1, _BATCH // weights[0].shape[1])
    if others or len(first) <= rows:
        return _nncf_integers(weights, group_size)
    values, scales = zip(*(_nncf_integers([part], group_size)[0] for part in first.split(rows)), strict=True)
    return [(torch.cat(values), torch.cat(scales))]


def _batches(sizes: dict[str, int]) -> list[list[str]]:
    """Group layers into calls of NNCF: each call takes a while, and several times the memory of its layers."""
    out: list[list[str]] = [[]]
    for name, size in sizes.items():
        if out[-1] and sum(sizes[n] for n in out[-1]) + size > _BATCH:
            out.append([])
        out[-1].append(name)
    return out
