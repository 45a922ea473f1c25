"""The stage `encoders`: how a T5 or a Qwen is exported, and its INT4, beside the original in `text_encoder_3_int4/`.

Layers are rounded one after the other with error feedback, as the transformer's blocks are: prompts go through the
original, and through what is rounded so far. Both embeddings then give the error. The same prompts also go through the
encoder with `wo`, the last layer of each feed-forward part, in 8 bits: its inputs are the products of two others, with
a few very large values. The smallest form whose error is within the bound is kept.

Notation: B prompts, M text tokens, K text width.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.artefact.checks import StoredPart, part_weights
from edgeprune.artefact.manifest import packed_folder
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, read_json
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.families import Shape
from edgeprune.families.parts import is_read, part_shapes, text_outputs
from edgeprune.quantization import feedback
from edgeprune.quantization.precision import (
    ENCODERS,
    TEXT_INT4,
    TEXT_INT4_WO8,
    TEXT_INT8,
    Precision,
    text_precision_of,
)
from edgeprune.quantization.quantize import empty_packed, linear_layers, replace, round_layers
from edgeprune.quantization.text import RoundedText
from edgeprune.residency.shards import mark_of
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.stages.encoder_kinds import KINDS, LAYER, Prompts, RoundedEncoder, chunks_of, rounded_encoder
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
_PASSES = 4
"""Passes of all prompts: the original's, one that shows what layers get, and those of both INT4 forms."""


@dataclass(frozen=True)
class Errors:
    """What a rounded encoder says against the original, over all tokens of all prompts, padding included.

    Of several hidden states that are read, each number is that of the worst.
    """

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


def check(encoders: str) -> None:
    """Check what `--encoders` says.

    Raises:
        InputError: it is none of ENCODERS.
    """
    if encoders not in ENCODERS:
        raise InputError(f"--encoders: found {encoders!r}, expected {', '.join(ENCODERS[:-1])} or {ENCODERS[-1]}")


def run(ws: Workspace, encoders: str, group_size: int, progress: Progress = silent) -> bool:
    """Record how a T5 or a Qwen3 is exported, and for INT4 write it; return whether the stage ran.

    Without such an encoder it does nothing.

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
    encoder = rounded_encoder(ws.out)
    if encoder is None:
        return False
    inputs: dict[str, Any] = {"encoders": encoders}
    if encoders == TEXT_INT4:
        inputs |= {"group_size": group_size, "prompts": calibrating(ws, count=PROMPTS)[:PROMPTS]}

    def write(key: str) -> dict[str, Any]:
        if encoders != TEXT_INT4:
            shutil.rmtree(packed_folder(ws.out / encoder.name), ignore_errors=True)  # left by an interrupted INT4 run
            ws.manifest.encoders = encoders
            return {}
        return _write(ws, encoder, inputs["prompts"], group_size, key, progress)

    return ws.stage(ENCODERS_STAGE, inputs, write, lambda: check_time(ws, encoders, group_size, progress))


def check_time(ws: Workspace, encoders: str, group_size: int, progress: Progress) -> None:
    """Say what the stage takes, and refuse what takes too long; see `Workspace.check_time`."""
    sizes = _sizes(ws.source)
    if sizes and encoders == TEXT_INT4:
        total, ways = work(ws.subject, encoders, group_size), [(f"--encoders {TEXT_INT8}", Work())]
        written = written_bytes(ws.source, encoders, group_size)
        ws.check_time(ENCODERS_STAGE, total, ways, progress, memory=memory(ws.memory, encoders), written=written)


def memory(of: Memory, encoders: str) -> int:
    """Return the bytes of memory that `run` takes at least; 0 where it computes nothing.

    A layer is there in float32, with as much for the moments of its inputs, beside the rounded table of words; or the
    table as it is read and as it is rounded.
    """
    encoder = rounded_encoder(of.subject.source)
    sizes = _sizes(of.subject.source) if encoders == TEXT_INT4 else {}
    if not sizes or encoder is None:
        return 0
    first = sum(math.prod(shape) for name, shape in sizes.items() if (layer := LAYER.match(name)) and layer[1] == "0")
    words = math.prod(sizes[KINDS[encoder.kind].words])
    return of.process + max(8 * first + words, 3 * words)


def work(subject: Subject, encoders: str, group_size: int) -> Work:
    """Return the work of `run`."""
    sizes = _sizes(subject.source)
    if not sizes or encoders != TEXT_INT4:
        return Work()
    in_layers = sum(math.prod(shape) for name, shape in sizes.items() if LAYER.match(name))
    flops = 2.0 * in_layers * _PASSES * PROMPTS * subject.generation.max_sequence_length
    moved = 2.0 * sum(map(math.prod, sizes.values())) + written_bytes(subject.source, encoders, group_size)
    return Work(flops=flops, moved=moved, rounded=in_layers * CALIBRATED["feedback"])


def written_bytes(source: Path, encoders: str, group_size: int) -> int:
    """Return the most bytes that the stage writes."""
    sizes = _sizes(source) if encoders == TEXT_INT4 else {}
    wider = partial(text_precision_of, form=TEXT_INT4_WO8, group_size=group_size)
    return sum(wider(name, shape).nbytes(shape) for name, shape in sizes.items())


def _sizes(source: Path) -> dict[str, Shape]:
    """Return the shapes of what is read of a pipeline's T5 or Qwen3; empty without one."""
    encoder = rounded_encoder(source)
    if encoder is None:
        return {}
    path = source / encoder.name / "config.json"
    shapes = part_shapes(encoder.kind, read_json(path), path) or {}
    return {name: shape for name, shape in shapes.items() if is_read(encoder.kind, name, encoder.states)}


def _write(
    ws: Workspace, encoder: RoundedEncoder, prompts: list[str], group_size: int, key: str, progress: Progress
) -> dict[str, Any]:
    """Write the encoder in INT4, measure it, and keep the form that the bound asks for."""
    name, folder = encoder.name, ws.out / encoder.name
    packed, original = packed_folder(folder), part_weights(folder, encoder.kind)
    assert original is not None  # its class has a table
    wider = digest([key, TEXT_INT4_WO8])
    if mark_of(packed).get("inputs") != wider:
        _round(ws, encoder, prompts, group_size, key, original, progress)
    measured = read_json(packed / "config.json")["edgeprune"]
    errors = {form: Errors(**measured[form]) for form in (TEXT_INT4, TEXT_INT4_WO8)}
    form = next((form for form, found in errors.items() if found.within), TEXT_INT8)
    for tried, found in errors.items():
        progress(f"{name}: {tried}: {found.shown()}{' is kept' if tried == form else ''}")
    if form == TEXT_INT8:
        progress(f"{name}: no INT4 form is within {BOUND} and a cosine of {LEAST_COSINE}, so it is exported in 8 bits")
        shutil.rmtree(packed)
    elif form == TEXT_INT4_WO8 and mark_of(packed).get("inputs") != wider:
        _widen(ws, encoder, original, group_size, wider, progress)
    if form != TEXT_INT8:
        ws.manifest.hash_files(ws.out, packed.name)
    ws.manifest.encoders = form
    return {"form": form, "errors": {tried: asdict(found) for tried, found in errors.items()}}


def _round(
    ws: Workspace,
    encoder: RoundedEncoder,
    prompts: list[str],
    group_size: int,
    key: str,
    original: StoredPart,
    progress: Progress,
) -> None:
    """Write all of the encoder in INT4; its config.json then has the errors of both forms."""
    folder, compute = ws.out / encoder.name, ws.original.compute
    pipe = StagedPipeline(folder.parent, None, compute)
    tokens = pipe.tokens(encoder.name, prompts, pipe.length(encoder.name, ws.generation.max_sequence_length))
    config = read_json(folder / "config.json")
    width = text_outputs(encoder.kind, config, folder / "config.json")[0]
    size = 3 * 4 * max(1, len(encoder.states)) * tokens[0].numel() * width
    spill = Spill(ws.cache / "text-streams", room=max(0, compute.left() // 4) if compute.device.type == "cpu" else size)
    spill.need(size)
    rounder = _Rounder(folder, encoder, original, tokens, group_size, spill, compute.device, config)
    try:
        write_transformer(
            ws.out, packed_folder(folder).name, config, rounder.chunks, rounder.make,
            inputs=key, found=rounder.found, progress=progress, file=FILE,
        )  # fmt: skip
    finally:
        spill.clear()


class _Rounder:
    """Rounds an encoder layer by layer and sends prompts on, through the original and through both INT4 forms.

    Args:
        folder: the encoder's.
        encoder: what it is.
        original: its tensors.
        tokens: of the prompts, ids and mask (B, M).
        group_size: weights that share a scale.
        spill: keeps what passes from layer to layer.
        device: to compute on, in float32.
        config: gets the errors once the last layer is there.
    """

    def __init__(
        self,
        folder: Path,
        encoder: RoundedEncoder,
        original: StoredPart,
        tokens: tuple[torch.Tensor, torch.Tensor],
        group_size: int,
        spill: Spill,
        device: torch.device,
        config: dict[str, Any],
    ) -> None:
        self.original, self.spill, self.device, self.config = original, spill, device, config
        self.group_size, self.batches = group_size, -(-len(tokens[0]) // _AT_ONCE)
        self.layers = KINDS[encoder.kind](Prompts(folder, original, *tokens, encoder, device))
        self.blocks, self.last = self.layers.blocks, self.layers.last
        self._words: Tensors = {}
        self.chunks = chunks_of(original, encoder, TEXT_INT4, group_size)
        self._begin(tokens[0])

    @torch.no_grad()
    def _begin(self, ids: torch.Tensor) -> None:
        """Look the prompts' words up, in the original's table and in the rounded one."""
        rounded = RoundedText(self.original.__getitem__, TEXT_INT4)
        words = self.layers.words.removesuffix(".weight")
        packed, scale = (rounded(words + suffix) for suffix in PACKED[:2])
        table = self.original[self.layers.words]
        for index, rows in enumerate(ids.split(_AT_ONCE)):
            exact, near = table[rows].float(), packed[rows].float() * scale[rows].float()
            self.spill.put(str(index), {EXACT: exact, TEXT_INT4: near, TEXT_INT4_WO8: near})
        self._words = {f"{words}.weight_packed": packed.view(torch.uint8), f"{words}.weight_scale": scale}

    def make(self, index: int) -> Tensors:
        """Round a layer, or take what is outside layers, and return its tensors as they are stored."""
        if index == len(self.blocks):
            self._measure()
            return self._words | {name: self.original[name].half() for name in self.layers.outside}
        block, prefix = self._filled(index), f"{self.layers.prefix}{index}."
        wo, rule = block.get_submodule(self.last), self._rule(linear_layers(block), prefix)
        self._run(block, EXACT, after=index + 1)
        try:
            round_layers(block.to("cpu"), rule, partial(self._moments, block))  # NNCF traces with inputs that are there
        except InputError as error:
            raise InputError(f"{prefix}{error}") from None
        state = block.state_dict()
        tensors = {prefix + n: (t if n.endswith(PACKED) else t.half()).cpu() for n, t in state.items()}
        self._carry(index, wo, tensors)
        return tensors

    def _moments(self, block: Any, layers: dict[str, nn.Linear]) -> dict[str, list[torch.Tensor]]:
        """Return the moments of the inputs of a block's layers, which computes on the device meanwhile."""
        block.to(self.device)
        found = feedback.second_moments(layers, partial(self._run, block, TEXT_INT4), self.batches)
        block.to("cpu")
        return found

    def found(self, index: int, weights: Weights) -> None:
        """Take over a layer that was rounded before."""
        if index == len(self.blocks):
            self._measure()
            return
        block, prefix = self._filled(index), f"{self.layers.prefix}{index}."
        self._run(block, EXACT, after=index + 1)
        layers = linear_layers(block)
        for name, p in self._rule(layers, prefix).items():
            replace(block, name, empty_packed(layers[name], p))
        self._carry(index, layers[self.last], {name: weights[name] for name in self.chunks[index]})

    def _filled(self, index: int) -> Any:
        """Return a layer with the original's numbers in float32."""
        block, prefix = self.blocks[index], f"{self.layers.prefix}{index}."
        if index + 1 < len(self.blocks):
            self.original.ahead(f"{self.layers.prefix}{index + 1}.{n}" for n in self.blocks[index + 1].state_dict())
        state = {n: self.original[prefix + n].to(self.device, torch.float32) for n in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False)

    def _rule(self, layers: dict[str, nn.Linear], prefix: str) -> dict[str, Precision]:
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        return {
            name: text_precision_of(f"{prefix}{name}.weight", shape, TEXT_INT4, group_size=self.group_size)
            for name, shape in shapes.items()
        }

    def _carry(self, index: int, wo: nn.Linear, tensors: Tensors) -> None:
        """Send the prompts of both forms through a layer as it is on disk, so that a resumed run ends in the same."""
        block, prefix = self.blocks[index], f"{self.layers.prefix}{index}."
        numbers = {n: t if n.endswith(PACKED) else t.float() for n, t in tensors.items()}
        block.load_state_dict({n.removeprefix(prefix): t.to(self.device) for n, t in numbers.items()}, assign=True)
        self._run(block.to(self.device), TEXT_INT4, after=index + 1)
        replace(block, self.last, wo)
        round_layers(block, {self.last: Precision(8, wo.in_features)})
        self._run(block.to(self.device), TEXT_INT4_WO8, after=index + 1)
        block.to("meta")

    @torch.no_grad()
    def _run(self, block: Any, stream: str, *, after: int | None = None) -> None:
        """Send the prompts of one stream through a layer; keep what it makes of them as the state of number `after`."""
        for index in range(self.batches):
            key, rows = str(index), slice(index * _AT_ONCE, (index + 1) * _AT_ONCE)
            streams = self.spill.get(key)
            made = self.layers.run(block, streams[stream].to(self.device), rows)
            if after is None:
                continue
            self.spill.put(key, streams | {stream: made})
            if after in self.layers.states and after < len(self.blocks):
                self.spill.put(f"{key}.{after}.{stream}", {stream: made})

    @torch.no_grad()
    def _measure(self) -> None:
        """Put the errors of both forms into the config."""
        sums = {form: [Sums() for _ in self.layers.states] for form in (TEXT_INT4, TEXT_INT4_WO8)}
        for index in range(self.batches):
            for at, state in enumerate(self.layers.states):
                exact = self._said(index, state, EXACT)
                for form, each in sums.items():
                    each[at].add(self._said(index, state, form), exact)
        self.config["edgeprune"] = {"form": TEXT_INT4} | {form: asdict(worst(each)) for form, each in sums.items()}

    def _said(self, index: int, state: int, stream: str) -> torch.Tensor:
        """Return a state (B, M, D) that is read of a batch of prompts of one stream."""
        key = f"{index}.{state}.{stream}" if state < len(self.blocks) else str(index)
        return self.layers.said(self.spill.get(key)[stream])


@dataclass
class Sums:
    """Sums over the tokens of one state, added batch by batch."""

    difference: float = 0.0
    """Squares of the differences from the original's numbers."""
    norm: float = 0.0
    """Squares of the original's numbers."""
    cosines: float = 0.0
    least: float = 1.0
    """The least cosine of a token."""
    tokens: int = 0

    def add(self, found: torch.Tensor, exact: torch.Tensor) -> None:
        """Add a batch: what is found and the original's (B, M, D)."""
        cosine = nn.functional.cosine_similarity(found, exact, dim=-1)
        self.difference += float((found - exact).double().square().sum())
        self.norm += float(exact.double().square().sum())
        self.cosines += float(cosine.double().sum())
        self.least = _least([self.least, float(cosine.min())])
        self.tokens += cosine.numel()


def worst(states: Sequence[Sums]) -> Errors:
    """Return the errors of the worst state, each number for itself."""
    relative = -_least([-math.sqrt(one.difference) / max(math.sqrt(one.norm), 1e-12) for one in states])
    return Errors(relative, _least([one.cosines / one.tokens for one in states]), _least([one.least for one in states]))


def _least(numbers: list[float]) -> float:
    """Return the least number; NaN if one is."""
    return float(torch.tensor(numbers, dtype=torch.float64).min())


def errors(found: torch.Tensor, exact: torch.Tensor, *, states: int = 1) -> Errors:
    """Return how far embeddings (B, M, K) are from the original's.

    Args:
        found: of the rounded encoder.
        exact: of the original.
        states: hidden states of one width that are side by side in K.
    """
    sums = [Sums() for _ in range(states)]
    for one, *pair in zip(sums, found.chunk(states, dim=-1), exact.chunk(states, dim=-1), strict=True):
        one.add(*pair)
    return worst(sums)


def _widen(
    ws: Workspace, encoder: RoundedEncoder, original: StoredPart, group_size: int, key: str, progress: Progress
) -> None:
    """Write the encoder again with `wo` in 8 bits; all else stays."""
    packed, last = packed_folder(ws.out / encoder.name), KINDS[encoder.kind].last
    narrow, wide = Weights(packed), RoundedText(original.__getitem__, TEXT_INT4_WO8)
    config = read_json(packed / "config.json")
    config["edgeprune"]["form"] = TEXT_INT4_WO8
    chunks = chunks_of(original, encoder, TEXT_INT4_WO8, group_size)

    def make(index: int) -> Tensors:
        return {name: wide(name) if f".{last}." in name else narrow[name] for name in chunks[index]}

    write_transformer(ws.out, packed.name, config, chunks, make, inputs=key, progress=progress, file=FILE)
