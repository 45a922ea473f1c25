"""The stage `encoders`: how a T5 is exported, and its INT4, which `text_encoder_3_int4/` holds beside the original.

Layers are rounded one after the other with error feedback, as the transformer's blocks are: prompts go through the
original, and through what is rounded so far. Both embeddings then give the error. The same prompts also go through the
T5 with `wo`, the last layer of each feed-forward part, in 8 bits: its inputs are the products of two others, with a few
very large values. The smallest form whose error is within the bound is kept.

Notation: B prompts, M text tokens, K text width.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.artefact.checks import StoredPart, part_weights
from edgeprune.artefact.loading import empty_part
from edgeprune.artefact.manifest import packed_folder
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, read_json
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.export.modules import T5Encoder, position_bias, run_t5_block
from edgeprune.families.encoders import QWEN3, T5, text_encoders
from edgeprune.families.parts import part_shapes
from edgeprune.quantization import feedback
from edgeprune.quantization.precision import (
    ENCODERS,
    T5_INT4,
    T5_INT4_WO8,
    T5_INT8,
    Precision,
    t5_precision_of,
)
from edgeprune.quantization.quantize import empty_packed, linear_layers, replace, round_layers
from edgeprune.quantization.t5 import WORDS, RoundedT5
from edgeprune.residency.shards import mark_of
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.stages.memory import Memory
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.work import CALIBRATED, Subject, Work
from edgeprune.stages.workspace import ENCODERS_STAGE, Workspace

PROMPTS = 16
"""Prompts that calibrate, each with all of its tokens: 4,096 rows for the 4,096 inputs of SD3.5's T5-XXL."""
BOUND = 0.1
"""Largest error, by the norm of the embedding, with which a form is kept.

Noise of twice that costs the built-in model less than 2 % of its score, by the interval's upper end (docs/int4.md);
prompts of other models say more than those of its shapes world.
"""
LEAST_COSINE = 0.99
"""Least mean cosine of a token to the original's; an error of `BOUND` at a right angle has 0.995."""
EXACT = "exact"
_AT_ONCE = 4
"""Prompts that pass through a layer together: scores of T5-XXL's attention then take 0.07 to 0.27 GB."""
FILE = "model.safetensors"
_LAYER = re.compile(r"encoder\.block\.(\d+)\.")
_WO = "layer.1.DenseReluDense.wo"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_NORM = "encoder.final_layer_norm.weight"
_PASSES = 4
"""Passes of all prompts: the original's, one that shows what layers get, and those of both INT4 forms."""


@dataclass(frozen=True)
class Errors:
    """What a rounded T5 says against the original, over all tokens of all prompts, padding included."""

    relative: float
    """Norm of the difference by the norm of the embedding."""
    cosine: float
    """Mean over tokens."""
    least_cosine: float
    """Of the worst token."""

    @property
    def within(self) -> bool:
        """Whether a form with these errors is kept."""
        return self.relative <= BOUND and self.cosine >= LEAST_COSINE

    def shown(self) -> str:
        """Return them for a line."""
        return f"error {self.relative:.3f}, cosine {self.cosine:.4f} (worst token {self.least_cosine:.4f})"


def t5_of(folder: Path) -> str | None:
    """Return the name of a pipeline's T5; None without one."""
    return next((name for name, kind in text_encoders(folder).items() if kind == T5), None)


def check(encoders: str) -> None:
    """Check what `--encoders` says.

    Raises:
        InputError: it is none of ENCODERS.
    """
    if encoders not in ENCODERS:
        raise InputError(f"--encoders: found {encoders!r}, expected {', '.join(ENCODERS[:-1])} or {ENCODERS[-1]}")


def run(ws: Workspace, encoders: str, group_size: int, progress: Progress = silent) -> bool:
    """Record how a T5 is exported, and for INT4 write it; return whether the stage ran.

    Of a Qwen3, 8 bits and half precision are recorded; where INT4 is asked for, it is exported in 8 bits. Without
    either the stage does nothing.

    Args:
        ws: the workspace.
        encoders: one of precision.ENCODERS.
        group_size: weights that share a scale in INT4.
        progress: called after each layer.

    Raises:
        InputError: nothing is pruned yet, or there is no such form.
        StaleStageError: see `Workspace.stage`.
    """
    check(encoders)
    ws.need("prune", ENCODERS_STAGE)
    name, language_model = t5_of(ws.out), QWEN3 in text_encoders(ws.out).values()
    if language_model and encoders == T5_INT4:
        progress(f"{QWEN3}: is exported in 8 bits, INT4 is not supported for it; --encoders {T5_INT8} says the same")
        encoders = T5_INT8
    if name is None and not language_model:
        return False
    inputs: dict[str, Any] = {"encoders": encoders}
    if encoders == T5_INT4:
        inputs |= {"group_size": group_size, "prompts": calibrating(ws, count=PROMPTS)[:PROMPTS]}

    def write(key: str) -> dict[str, Any]:
        if name is None or encoders != T5_INT4:
            if name is not None:
                shutil.rmtree(packed_folder(ws.out / name), ignore_errors=True)  # left by an interrupted INT4 run
            ws.manifest.encoders = encoders
            return {}
        return _write(ws, name, inputs["prompts"], group_size, key, progress)

    return ws.stage(ENCODERS_STAGE, inputs, write, lambda: check_time(ws, encoders, group_size, progress))


def check_time(ws: Workspace, encoders: str, group_size: int, progress: Progress) -> None:
    """Say what the stage takes, and refuse what takes too long; see `Workspace.check_time`."""
    sizes = _sizes(ws.source)
    if sizes and encoders == T5_INT4:
        total, ways = work(ws.subject, encoders, group_size), [(f"--encoders {T5_INT8}", Work())]
        written = written_bytes(ws.source, encoders, group_size)
        ws.check_time(ENCODERS_STAGE, total, ways, progress, memory=memory(ws.memory, encoders), written=written)


def memory(of: Memory, encoders: str) -> int:
    """Return the bytes of memory that `run` takes at least; 0 where it computes nothing.

    A layer is there in float32, with as much for the moments of its inputs, beside the rounded table of words; or the
    table as it is read and as it is rounded.
    """
    sizes = _sizes(of.subject.source) if encoders == T5_INT4 else {}
    if not sizes:
        return 0
    words = math.prod(sizes[WORDS])
    return of.process + max(8 * _numbers(sizes, ".block.0.") + words, 3 * words)


def work(subject: Subject, encoders: str, group_size: int) -> Work:
    """Return the work of `run`."""
    sizes = _sizes(subject.source)
    if not sizes or encoders != T5_INT4:
        return Work()
    in_layers = _numbers(sizes, ".block.")
    flops = 2.0 * in_layers * _PASSES * PROMPTS * subject.generation.max_sequence_length
    moved = 2.0 * sum(map(math.prod, sizes.values())) + written_bytes(subject.source, encoders, group_size)
    return Work(flops=flops, moved=moved, rounded=in_layers * CALIBRATED["feedback"])


def written_bytes(source: Path, encoders: str, group_size: int) -> int:
    """Return the most bytes that the stage writes."""
    sizes = _sizes(source) if encoders == T5_INT4 else {}
    wider = partial(t5_precision_of, form=T5_INT4_WO8, group_size=group_size)
    return sum(wider(name, shape).nbytes(shape) for name, shape in sizes.items())


def _sizes(source: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a pipeline's T5; empty without one."""
    name = t5_of(source)
    path = source / (name or "") / "config.json"
    return (part_shapes(T5, read_json(path), path) or {}) if name else {}


def _numbers(sizes: dict[str, tuple[int, ...]], part: str) -> int:
    return sum(math.prod(shape) for name, shape in sizes.items() if part in name)


def _write(
    ws: Workspace, name: str, prompts: list[str], group_size: int, key: str, progress: Progress
) -> dict[str, Any]:
    """Write the T5 in INT4, measure it, and keep the form that the bound asks for."""
    folder = ws.out / name
    packed, original = packed_folder(folder), part_weights(folder, T5)
    assert original is not None  # T5 has a table
    wider = digest([key, T5_INT4_WO8])
    if mark_of(packed).get("inputs") != wider:
        _round(ws, name, prompts, group_size, key, original, progress)
    measured = read_json(packed / "config.json")["edgeprune"]
    errors = {form: Errors(**measured[form]) for form in (T5_INT4, T5_INT4_WO8)}
    form = next((form for form, found in errors.items() if found.within), T5_INT8)
    for tried, found in errors.items():
        progress(f"{name}: {tried}: {found.shown()}{' is kept' if tried == form else ''}")
    if form == T5_INT8:
        progress(f"{name}: no INT4 form is within {BOUND} and a cosine of {LEAST_COSINE}, so it is exported in 8 bits")
        shutil.rmtree(packed)
    elif form == T5_INT4_WO8 and mark_of(packed).get("inputs") != wider:
        _widen(ws, packed, original, group_size, wider, progress)
    if form != T5_INT8:
        ws.manifest.hash_files(ws.out, packed.name)
    ws.manifest.encoders = form
    return {"form": form, "errors": {tried: asdict(found) for tried, found in errors.items()}}


def _round(
    ws: Workspace,
    name: str,
    prompts: list[str],
    group_size: int,
    key: str,
    original: StoredPart,
    progress: Progress,
) -> None:
    """Write all of the T5 in INT4; its config.json then has the errors of both forms."""
    folder, compute = ws.out / name, ws.original.compute
    length = ws.generation.max_sequence_length
    ids = StagedPipeline(folder.parent, None, compute).token_ids(name, prompts, length)
    config = read_json(folder / "config.json")
    size = 3 * 4 * ids.numel() * int(config["d_model"])
    spill = Spill(ws.cache / "text-streams", room=max(0, compute.left() // 4) if compute.device.type == "cpu" else size)
    spill.need(size)
    rounder = _Rounder(folder, original, ids, group_size, spill, compute.device, config)
    try:
        write_transformer(
            ws.out, packed_folder(folder).name, config, rounder.chunks, rounder.make,
            inputs=key, found=rounder.found, progress=progress, file=FILE,
        )  # fmt: skip
    finally:
        spill.clear()


class _Rounder:
    """Rounds a T5 layer by layer and sends prompts on, through the original and through both INT4 forms.

    Args:
        folder: the T5's.
        original: its tensors.
        ids: of the prompts (B, M).
        group_size: weights that share a scale.
        spill: keeps what passes from layer to layer.
        device: to compute on, in float32.
        config: gets the errors once the last layer is there.
    """

    def __init__(
        self,
        folder: Path,
        original: StoredPart,
        ids: torch.Tensor,
        group_size: int,
        spill: Spill,
        device: torch.device,
        config: dict[str, Any],
    ) -> None:
        self.original, self.spill, self.device, self.config = original, spill, device, config
        self.group_size, self.batches = group_size, -(-len(ids) // _AT_ONCE)
        self.model = empty_part(folder, T5).eval().requires_grad_(False)
        self.blocks = self.model.encoder.block
        self.bias = position_bias(T5Encoder(self.model).table(original[_BIAS].float()), ids).to(device)
        self._words: Tensors = {}
        self.chunks = _chunks(original, T5_INT4, group_size)
        self._begin(ids)

    @torch.no_grad()
    def _begin(self, ids: torch.Tensor) -> None:
        """Look the prompts' words up, in the original's table and in the rounded one."""
        rounded = RoundedT5(self.original.__getitem__, T5_INT4)
        packed, scale = (rounded(WORDS.removesuffix(".weight") + suffix) for suffix in PACKED[:2])
        table = self.original[WORDS]
        for index, rows in enumerate(ids.split(_AT_ONCE)):
            exact, near = table[rows].float(), packed[rows].float() * scale[rows].float()
            self.spill.put(str(index), {EXACT: exact, T5_INT4: near, T5_INT4_WO8: near})
        self._words = {"shared.weight_packed": packed.view(torch.uint8), "shared.weight_scale": scale}

    def make(self, index: int) -> Tensors:
        """Round a layer, or take what is outside layers, and return its tensors as they are stored."""
        if index == len(self.blocks):
            self._measure()
            return self._words | {_NORM: self.original[_NORM].half()}
        block, prefix = self._filled(index), f"encoder.block.{index}."
        layers = linear_layers(block)
        run = partial(self._run, block, T5_INT4)
        try:
            moments = feedback.second_moments(layers, run, self.batches)
        except InputError as error:
            raise InputError(f"{prefix}{error}") from None
        self._run(block, EXACT, advance=True)
        wo = layers[_WO]
        round_layers(block, self._rule(layers, prefix), moments)
        del moments, layers, run
        state = block.state_dict()
        tensors = {prefix + n: (t if n.endswith(PACKED) else t.half()).cpu() for n, t in state.items()}
        self._carry(index, wo, tensors)
        return tensors

    def found(self, index: int, weights: Weights) -> None:
        """Take over a layer that was rounded before."""
        if index == len(self.blocks):
            self._measure()
            return
        block, prefix = self._filled(index), f"encoder.block.{index}."
        self._run(block, EXACT, advance=True)
        layers = linear_layers(block)
        for name, p in self._rule(layers, prefix).items():
            replace(block, name, empty_packed(layers[name], p))
        self._carry(index, layers[_WO], {name: weights[name] for name in self.chunks[index]})

    def _filled(self, index: int) -> Any:
        """Return a layer with the original's numbers in float32."""
        block, prefix = self.blocks[index], f"encoder.block.{index}."
        if index + 1 < len(self.blocks):
            self.original.ahead(f"encoder.block.{index + 1}.{n}" for n in self.blocks[index + 1].state_dict())
        state = {n: self.original[prefix + n].to(self.device, torch.float32) for n in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False)

    def _rule(self, layers: dict[str, nn.Linear], prefix: str) -> dict[str, Precision]:
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        return {
            name: t5_precision_of(f"{prefix}{name}.weight", shape, T5_INT4, group_size=self.group_size)
            for name, shape in shapes.items()
        }

    def _carry(self, index: int, wo: nn.Linear, tensors: Tensors) -> None:
        """Send the prompts of both forms through a layer as it is on disk, so that a resumed run ends in the same."""
        block, prefix = self.blocks[index], f"encoder.block.{index}."
        numbers = {n: t if n.endswith(PACKED) else t.float() for n, t in tensors.items()}
        block.load_state_dict({n.removeprefix(prefix): t.to(self.device) for n, t in numbers.items()}, assign=True)
        self._run(block, T5_INT4, advance=True)
        replace(block, _WO, wo)
        round_layers(block, {_WO: Precision(8, wo.in_features)}, {})
        self._run(block.to(self.device), T5_INT4_WO8, advance=True)
        block.to("meta")

    @torch.no_grad()
    def _run(self, block: Any, stream: str, *, advance: bool = False) -> None:
        """Send the prompts of one stream through a layer; `advance` keeps what it makes of them."""
        for key in map(str, range(self.batches)):
            streams = self.spill.get(key)
            made = run_t5_block(block, streams[stream].to(self.device), self.bias)
            if advance:
                self.spill.put(key, streams | {stream: made})

    @torch.no_grad()
    def _measure(self) -> None:
        """Put the errors of both forms into the config."""
        norm = self.model.encoder.final_layer_norm
        norm.load_state_dict({"weight": self.original[_NORM].float()}, assign=True)
        exact = torch.cat([norm(one[EXACT]) for one in self._streams()])
        found = {}
        for form in (T5_INT4, T5_INT4_WO8):
            rounded = torch.cat([norm(one[form]) for one in self._streams()])
            found[form] = asdict(errors(rounded, exact))
        self.config["edgeprune"] = {"form": T5_INT4} | found

    def _streams(self) -> Iterator[Tensors]:
        return (self.spill.get(str(index)) for index in range(self.batches))


def errors(found: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Return how far embeddings (B, M, K) are from the original's."""
    cosine = nn.functional.cosine_similarity(found, exact, dim=-1)
    relative = float((found - exact).norm() / exact.norm().clamp_min(1e-12))
    return Errors(relative, float(cosine.mean()), float(cosine.min()))


def _chunks(original: StoredPart, form: str, group_size: int) -> list[dict[str, int]]:
    """Return the bytes of what is stored, by name: of each layer, then of what is outside layers."""
    shapes = {name: original.weights.shapes[stored[0]] for name, stored in sorted(original.names.items())}
    chunks: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        found = _LAYER.match(name)
        chunk = chunks.setdefault(int(found[1]) if found else len(shapes), {})
        p, layer = t5_precision_of(name, shape, form, group_size=group_size), name.removesuffix(".weight")
        if p.bits == 16:
            chunk[name] = 2 * math.prod(shape)
        else:
            chunk[f"{layer}.weight_packed"] = math.prod(shape) * p.bits // 8
            chunk[f"{layer}.weight_scale"] = 2 * math.prod(shape) // p.group_size
    return [chunks[index] for index in sorted(chunks)]


def _widen(ws: Workspace, packed: Path, original: StoredPart, group_size: int, key: str, progress: Progress) -> None:
    """Write the T5 again with `wo` in 8 bits; all else stays."""
    narrow, wide = Weights(packed), RoundedT5(original.__getitem__, T5_INT4_WO8)
    config = read_json(packed / "config.json")
    config["edgeprune"]["form"] = T5_INT4_WO8
    chunks = _chunks(original, T5_INT4_WO8, group_size)

    def make(index: int) -> Tensors:
        return {name: wide(name) if f"{_WO}." in name else narrow[name] for name in chunks[index]}

    write_transformer(ws.out, packed.name, config, chunks, make, inputs=key, progress=progress, file=FILE)
