"""An artefact, or any diffusers folder of a family, becomes an optimum-style folder of ONNX models.

    export(Path("compressed"), Path("onnx"))

Each network is traced, written, checked by onnx.checker and compared with torch (parity.py) before the next one is
loaded. Only a few blocks of the transformer, or layers of a T5, are in memory at a time. An interrupted export resumes:
compared networks are kept, and a half-written file continues where it stopped (external_data.py). The modulation is a
network of its own, unless it is asked for inside the transformer (modulation.py). A T5 text encoder is
stored in 8 bits (precision.py) and compared with torch on the same integers (stored_encoder.py), and so is a Qwen3. The
VAE's encoder is not exported. folder.py writes the other files of the folder.
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
from torch import nn

from edgeprune.artefact.loading import open_transformer
from edgeprune.common.errors import ParityError
from edgeprune.common.progress import Progress, silent
from edgeprune.export import APART, INSIDE, external_data, graph, loaders, modules, parity, precisions, text
from edgeprune.export.folder import is_quantized, write
from edgeprune.export.language_model import LanguageModel
from edgeprune.export.modulation import ModulatedTransformer, Modulation, layers_of, rows_instead
from edgeprune.export.stored_encoder import StoredEncoder
from edgeprune.export.unfinished import MARK, Unfinished
from edgeprune.families import Axes
from edgeprune.families.encoders import LONG, text_encoders
from edgeprune.residency.stored import StoredTransformer
from edgeprune.runtimes.modulation import ROWS, WIDTH
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.generation import longest_prompt
from edgeprune.targets import Target


def export(
    artefact: Path,
    out: Path,
    *,
    device: Target | None = None,
    modulation: str = INSIDE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the folder `out`, which is the same for every device.

    If the artefact has `transformer_int4`, its integers are kept; otherwise weights are float32.

    Args:
        artefact: the artefact's folder, or a diffusers folder.
        out: the folder to write.
        device: what the export is for.
        modulation: APART or INSIDE.
        progress: see progress.Progress.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something other than an
            export.
        ParityError: a network does not compute what its checkpoint computes.
        DiskError: the disk is full, or `out` cannot be written; the next call resumes.
    """
    return write(
        artefact, out, "onnx", {"modulation": modulation},
        lambda work: networks(artefact, work, modulation, progress),
        measure=lambda folder: precisions.measured(folder, progress),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- the networks

TRIED = 16
"""Text tokens of a prompt at which half precision is tried: those with the largest values. All would take minutes."""
LARGE = 10**9
"""A transformer with more stored numbers is compared at one size only: each size reads all weights twice."""
Opened = Callable[[Path], parity.Runner]
"""Opens a written ONNX file to run it."""
Module = modules.Transformer | Modulation | modules.TextEncoder | modules.T5Encoder | LanguageModel | modules.VaeDecoder


@dataclass
class NetworkSource:
    """One network of the pipeline before it is written: its module, and inputs to trace and compare it with."""

    name: str
    module: Module
    """In float32; it is written."""
    traced: Mapping[str, torch.Tensor]
    """Inputs to trace with."""
    examples: Sequence[Mapping[str, torch.Tensor]]
    """Inputs to compare at."""
    trial: Mapping[str, torch.Tensor]
    """Inputs at which half precision is tried."""
    stored: StoredTransformer | StoredEncoder[Any] | None = None
    """Of the transformer and text encoders: `module` reads its layers from here when they run."""
    reread: Callable[[], Module] | None = None
    """Loads the network again, by name; None if `module` was loaded so."""
    apart: Modulation | None = None
    """Of a transformer that is written without its modulation: makes the rows that it reads. `module` is whole."""

    def free(self) -> None:
        """Free what `checkpoint` loads again, so that memory has room for something else meanwhile."""
        if self.reread is not None:
            vars(self).pop("module", None)

    def checkpoint(self) -> Module:
        """Return the network that the file is compared with. It takes the place of `module`, which is freed."""
        self.free()
        if self.reread is not None:
            self.module, self.reread = self.reread(), None
        return self.module

    def half(self) -> Module:
        """Return a copy of the module in half precision."""
        if isinstance(self.stored, StoredEncoder):
            half: Module = self.stored.running(torch.float16)
            return half
        if self.stored is not None and isinstance(self.module, Modulation):
            return Modulation.running(self.stored, torch.float16)
        if self.stored is not None:
            return modules.Transformer(self.stored.running(torch.float16))
        return copy.deepcopy(self.module).half()

    @property
    def inputs(self) -> Axes:
        """The dynamic axes of the inputs of the written file."""
        return self.module.inputs if self.apart is None else rows_instead(self.module.inputs, self.apart.inputs)

    def runner(self, file: parity.Runner) -> parity.Runner:
        """Return what runs the written file on the inputs of `module`."""
        return file if self.apart is None else parity.WithRows(file, self.apart)

    def to_ir(self, *, half: bool = False) -> ir.Model:
        """Trace the network to ONNX, computing in float32 or in half precision."""
        example = modules.half_inputs(self.traced) if half else self.traced
        if self.stored is None:
            module = self.half() if half else self.module
            return graph.to_ir(module, example, module.inputs, module.outputs)
        stored, dtype = self.stored, torch.float16 if half else torch.float32
        if isinstance(stored, StoredEncoder):
            encoder, reader = stored.traceable(dtype), functools.partial(stored.read, dtype=dtype)
            return graph.to_ir(encoder, example, encoder.inputs, encoder.outputs, read=reader)
        model = stored.traceable(dtype)
        if isinstance(self.module, Modulation):
            layers, reader = Modulation(model, dtype), functools.partial(stored.read, dtype=dtype)
            return graph.to_ir(layers, example, layers.inputs, layers.outputs, read=reader)
        compacted = stored.family.compact(model, stored.read)

        def read(name: str) -> torch.Tensor:
            return compacted[name].to(dtype) if name in compacted else stored.read(name, dtype)

        transformer = modules.Transformer(model) if self.apart is None else ModulatedTransformer(model)
        return graph.to_ir(transformer, example, transformer.inputs, transformer.outputs, read=read)


def networks(
    artefact: Path, work: Unfinished, modulation: str, progress: Progress, *, opened: Opened = parity.session
) -> dict[str, Any]:
    """Write and compare one network after the other; return further content of edgeprune_export.json.

    Args:
        artefact: the pipeline's folder.
        work: the unfinished export; its finished networks are skipped.
        modulation: APART or INSIDE.
        progress: see progress.Progress.
        opened: opens each `<network>/model.onnx` to compare it; may first convert it to another format.
    """
    for source in sources(artefact, work.has, modulation=modulation):
        progress(source.name)
        path = work.begin(source.name) / "model.onnx"
        save(source.name, source.to_ir(), path, progress)
        source.free()
        gc.collect()  # a traced program refers to itself
        file = opened(path)
        module, runner = source.checkpoint(), source.runner(file)
        outputs = list(module.outputs)
        record = parity.check(source.name, runner, module, source.examples, outputs, progress=progress)
        work.finish(source.name, {"parity": record} | width_of(module))
        del source, module, file, runner  # else it is still in memory while the next one is loaded
    return recorded_width(work) | {"opset": graph.OPSET, "parity": work.recorded("parity")}


def width_of(module: nn.Module) -> dict[str, Any]:
    """Return what is recorded of a modulation besides its errors: the width of its rows; of others nothing."""
    return {WIDTH: module.width} if isinstance(module, Modulation) else {}


def recorded_width(work: Unfinished) -> dict[str, Any]:
    """Return the width of the rows for edgeprune_export.json, if the export has its modulation apart."""
    width = work.recorded(WIDTH).get(ROWS)
    return {} if width is None else {WIDTH: width}


def sources(
    artefact: Path,
    has: Callable[[str], bool] = lambda name: False,
    *,
    modulation: str = INSIDE,
    half: bool = False,
    progress: Progress = silent,
) -> Iterator[NetworkSource]:
    """Yield the networks one after the other, except those that the export already has.

    Args:
        artefact: the pipeline's folder.
        has: whether the export has a network.
        modulation: APART or INSIDE.
        half: half precision will be tried: at prompts encoded by the folder's own encoders, not at random numbers.
        progress: see progress.Progress.
    """
    kept = has("transformer")
    rows_kept = modulation != APART or has(ROWS)
    if not (kept and rows_kept):
        stored = open_transformer(artefact, quantized=is_quantized(artefact))
        apart = modulation == APART and bool(layers_of(stored.model))
        rows_kept = rows_kept or not apart
        # Encoding takes minutes, which a resumed export of a model without rows need not spend.
        prompts = text.encoded(artefact, progress) if half and not (kept and rows_kept) else None
        if not rows_kept:
            yield _modulation(stored, prompts)
        if not kept:
            yield _transformer(artefact, stored, prompts, apart=apart)
        del stored

    # Nothing here may keep a network: `NetworkSource.free` has to free it.
    for name, kind in text_encoders(artefact).items():
        if has(name):
            continue
        yield _text_encoder(artefact, name, kind, half=half)
    if not has("vae_decoder"):
        yield _vae_decoder(artefact)


def _modulation(stored: StoredTransformer, prompts: Conditioning | None) -> NetworkSource:
    module = Modulation.running(stored)
    examples = [module.example(batch=b, seed=i) for i, b in enumerate((1, 3))]
    trial = examples[0] if prompts is None else module.example(batch=text.PROMPTS, text=prompts)
    return NetworkSource(
        name=ROWS, module=module, traced=module.example(batch=2), examples=examples, trial=trial, stored=stored
    )


def _transformer(
    artefact: Path, stored: StoredTransformer, prompts: Conditioning | None, *, apart: bool
) -> NetworkSource:
    transformer = modules.Transformer(stored.running())
    limit = transformer.family.latents(transformer.model.config).largest or 12
    tokens = longest_prompt(artefact)
    # Sizes are image tokens. An odd number takes another path through the crop of the position table. The size that is
    # used alone has four different numbers, none of them a traced one, so that swapped axes show.
    sizes = [(1, 8, 8, tokens), (4, 3, 5, 2), (2, 12, 9, 2 * tokens)]
    if sum(map(math.prod, stored.weights.shapes.values())) > LARGE:
        sizes = sizes[1:2]
    examples = [
        transformer.example(batch=b, height=min(h, limit), width=min(w, limit), tokens=m, seed=i)
        for i, (b, h, w, m) in enumerate(sizes)
    ]
    read = ModulatedTransformer(copy.deepcopy(stored.model)) if apart else transformer
    traced = read.example(batch=2, height=min(4, limit), width=min(6, limit), tokens=5)
    trial = examples[0]
    if prompts is not None:
        trial = transformer.example(
            batch=text.PROMPTS, height=min(3, limit), width=min(5, limit), tokens=TRIED,
            text=text.largest(prompts, TRIED),
        )  # fmt: skip
    return NetworkSource(
        name="transformer", module=transformer, traced=traced, examples=examples, trial=trial, stored=stored,
        apart=Modulation.running(stored) if apart else None,
    )  # fmt: skip


def _text_encoder(artefact: Path, name: str, kind: str, *, half: bool) -> NetworkSource:
    stored = loaders.stored_encoder(artefact, name, kind)
    encoder: loaders.Encoder = stored.running()
    longest = text.most_tokens(artefact, encoder)
    examples = [encoder.example(batch=b, tokens=m) for b, m in ((1, longest), (3, max(2, longest // 2 - 1)))]
    trial = examples[0]
    if half:
        trial = text.tokens(artefact, name, kind)
        if kind in LONG:  # slow in half precision
            trial = {key: value[:1] for key, value in trial.items()}
    return NetworkSource(
        name=name,
        module=encoder,
        stored=stored,
        reread=functools.partial(loaders.compared_encoder, artefact, name, kind),
        traced=encoder.example(batch=2, tokens=min(7, longest)),
        examples=examples,
        trial=trial,
    )


def _vae_decoder(artefact: Path) -> NetworkSource:
    vae = loaders.vae_decoder(artefact, loaders.by_vendor)
    examples = [vae.example(batch=b, height=h, width=w) for b, h, w in ((1, 8, 8), (3, 5, 7))]
    return NetworkSource(
        name="vae_decoder",
        module=vae,
        reread=functools.partial(loaders.vae_decoder, artefact, loaders.by_name),
        traced=vae.example(batch=2, height=4, width=6),
        examples=examples,
        trial=examples[0],
    )


def save(name: str, model: ir.Model, path: Path, progress: Progress = silent) -> None:
    """Write a network's file and check it; weights that an interrupted run wrote are kept.

    Raises:
        DiskError: the disk has too little room.
        ParityError: onnx.checker rejects the file.
    """
    external_data.save(model, path, journal=path.with_name(MARK), what=f"{name}: written", progress=progress)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{name}: not valid ONNX: {error}") from error
