"""An artefact, or any diffusers folder of a family, becomes an optimum-style folder of ONNX models.

    export(Path("compressed"), Path("onnx"))

Each network is traced, written, checked by onnx.checker and compared with torch (parity.py) before the next is loaded.
Of the transformer neither side ever holds more than a few blocks. After a kill, networks that were compared stay, and
the file that was being written goes on where it was (data.py). A T5 text encoder is stored in 8 bits (precision.py),
and compared with torch computing from the same integers. What it leaves out: the VAE's encoder, and the files around
the networks (folder.py).
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from edgeprune.artefact.checkpoint import open_transformer
from edgeprune.common.errors import ParityError
from edgeprune.export import graph, parity
from edgeprune.export.folder import from_pretrained, is_quantized, write
from edgeprune.export.progress import Progress, silent
from edgeprune.export.unfinished import MARK, Unfinished
from edgeprune.families.encoders import CLIP_POOLED, T5, text_encoders
from edgeprune.quantization.quantize import quantize_t5
from edgeprune.residency.stored import StoredTransformer
from edgeprune.sampling.generation import Generation, longest_prompt
from edgeprune.targets import Target


def export(artefact: Path, out: Path, *, device: Target | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out`, the same for every device.

    With `artefact/transformer_int4` its integers are kept, else weights are float32.

    Returns the content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something that is no export.
        ParityError: a model does not compute what its checkpoint computes.
        DiskError: the disk is full, or `out` cannot be written; the next call goes on from there.
    """
    return write(artefact, out, "onnx", {}, lambda work: networks(artefact, work, progress))


# ------------------------------------------------------------------------------------- the networks

LARGE = 10**9
"""Stored numbers beyond which a transformer is compared at one size: every size reads all weights twice more."""
Opened = Callable[[Path], parity.Runner]
"""From a written ONNX file to something that runs it."""
Module = graph.Transformer | graph.TextEncoder | graph.T5Encoder | graph.VaeDecoder


@dataclass(frozen=True)
class Part:
    """One network on its way into a file."""

    name: str
    module: Module
    """In float32; what a file is compared with."""
    traced: Mapping[str, torch.Tensor]
    """Inputs to trace with."""
    examples: Sequence[Mapping[str, torch.Tensor]]
    """Inputs to compare at."""
    stored: StoredTransformer | None = None
    """Of the transformer: `module` reads its blocks from here when they run."""

    def half(self) -> Module:
        """The module in half precision; `module` stays what it is."""
        if self.stored is not None:
            return graph.Transformer(self.stored.running(torch.float16))
        return copy.deepcopy(self.module).half()

    def to_ir(self, *, half: bool = False) -> ir.Model:
        """The network as ONNX, computing in float32 or in half precision."""
        example = graph.half(self.traced) if half else self.traced
        if self.stored is None:
            module = self.half() if half else self.module
            return graph.to_ir(module, example, module.inputs, module.outputs)
        stored, dtype = self.stored, torch.float16 if half else torch.float32
        model = stored.traceable(dtype)
        own = stored.family.compact(model, stored.read)

        def read(name: str) -> torch.Tensor:
            return own[name].to(dtype) if name in own else stored.read(name, dtype)

        transformer = graph.Transformer(model)
        return graph.to_ir(transformer, example, transformer.inputs, transformer.outputs, read=read)


def networks(
    artefact: Path, work: Unfinished, progress: Progress, *, opened: Opened = parity.session
) -> dict[str, Any]:
    """Write and compare one model after the other; what else edgeprune_export.json shall say.

    `opened` gets each `<network>/model.onnx` and says what is compared; it may leave another format there.
    """
    for part in parts(artefact, work.has):
        progress(part.name)
        path = work.begin(part.name) / "model.onnx"
        save(part.name, part.to_ir(), path, progress)
        gc.collect()  # what was traced refers to itself
        outputs = list(part.module.outputs)
        found = parity.check(part.name, opened(path), part.module, part.examples, outputs, progress=progress)
        work.finish(part.name, {"parity": found})
        del part  # else it is in memory while the next is loaded
    return {"opset": graph.OPSET, "parity": work.said("parity")}


def parts(artefact: Path, has: Callable[[str], bool] = lambda name: False) -> Iterator[Part]:
    """The networks one after the other, but for those that the export has."""
    if not has("transformer"):
        yield _transformer(artefact)

    for name, kind in text_encoders(artefact).items():
        if has(name):
            continue
        encoder, longest = text_encoder(artefact, name, kind)
        examples = [encoder.example(batch=b, tokens=m) for b, m in ((1, longest), (3, max(2, longest // 2 - 1)))]
        yield Part(name, graph.widen(encoder), encoder.example(batch=2, tokens=min(7, longest)), examples)
        del encoder

    if not has("vae_decoder"):
        vae = graph.VaeDecoder(from_pretrained(AutoencoderKL.from_pretrained, artefact / "vae"))
        examples = [vae.example(batch=b, height=h, width=w) for b, h, w in ((1, 8, 8), (3, 5, 7))]
        yield Part("vae_decoder", graph.widen(vae), vae.example(batch=2, height=4, width=6), examples)


def _transformer(artefact: Path) -> Part:
    stored = open_transformer(artefact, quantized=is_quantized(artefact))
    transformer = graph.Transformer(stored.running())
    limit = transformer.family.latents(transformer.model.config).largest or 12
    tokens = longest_prompt(artefact)
    # Sizes are image tokens. An odd number of them takes another path through the crop of the position table. Where one
    # size must do, no two of its numbers are the same, or the same as those traced, lest one axis passes for another.
    sizes = [(1, 8, 8, tokens), (4, 3, 5, 2), (2, 12, 9, 2 * tokens)]
    if sum(map(math.prod, stored.weights.shapes.values())) > LARGE:
        sizes = sizes[1:2]
    examples = [
        transformer.example(batch=b, height=min(h, limit), width=min(w, limit), tokens=m, seed=i)
        for i, (b, h, w, m) in enumerate(sizes)
    ]
    traced = transformer.example(batch=2, height=min(4, limit), width=min(6, limit), tokens=5)
    return Part("transformer", transformer, traced, examples, stored)


def text_encoder(artefact: Path, name: str, kind: str) -> tuple[graph.TextEncoder | graph.T5Encoder, int]:
    """A text encoder of this class, T5 already in 8 bits, and the most tokens that it is given."""
    if kind == T5:
        # In the folder's own precision: in float32, T5-XXL takes 19 GB before it is rounded.
        model = from_pretrained(functools.partial(T5EncoderModel.from_pretrained, dtype="auto"), artefact / name)
        return graph.T5Encoder(quantize_t5(model)), Generation.load(artefact).max_sequence_length
    load = CLIPTextModel.from_pretrained if kind == CLIP_POOLED else CLIPTextModelWithProjection.from_pretrained
    clip = graph.TextEncoder(from_pretrained(load, artefact / name))
    return clip, int(clip.config.max_position_embeddings)


def save(name: str, model: ir.Model, path: Path, progress: Progress = silent) -> None:
    """Write a network's file and have it checked; of its weights, what an earlier run wrote stays.

    Raises:
        DiskError: the disk has too little room.
        ParityError: onnx.checker refuses it.
    """
    graph.save(model, path, journal=path.with_name(MARK), what=f"{name}: written", progress=progress)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{name}: not valid ONNX: {error}") from error
