"""An artefact becomes a folder of Core ML packages (mlprogram for iOS 18 and macOS 15), INT4 kept as it is.

    export(Path("compressed"), Path("coreml"), device=load("macbook-m"))

Every `edgeprune::packed_linear` becomes constexpr_blockwise_shift_scale and linear, with the checkpoint's own integers
and half-precision scales. All else is stored and computed in half precision, save the angles of the timestep, which it
cannot hold. An export has one image size; its transformer takes the device's batches. A device's `chunks` splits the
transformer between blocks. Each network is compared with torch before the next is loaded.
A T5 text encoder has its 8-bit integers (precision.py) and half-precision tables, but computes in float32: T5-XXL's
values leave half precision.
What it leaves out: the VAE's encoder, several sizes in one package, and compiling (.mlmodelc): the device's.

Notation: B batch, C latent channels, h w latent height and width, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.artefact.checkpoint import HALF, INT4, open_transformer, read_config
from edgeprune.common.errors import EdgepruneError, InputError, ParityError
from edgeprune.common.extras import needs
from edgeprune.common.files import read_json
from edgeprune.export import graph, parity, to_onnx
from edgeprune.export.folder import from_pretrained, is_quantized, write
from edgeprune.export.progress import Progress, Steps, silent
from edgeprune.export.unfinished import SCRATCH, Unfinished
from edgeprune.families.encoders import CLIP, T5, text_encoders
from edgeprune.quantization.int4 import PackedLinear, unpack
from edgeprune.residency.stored import StoredTransformer
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.targets import Target

logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns at import of what only a Mac has
with needs("coreml"):
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from coremltools.converters.mil.mil import types

    from edgeprune.export.mil_reference import Package

CHUNK_BYTES = 400e6
"""Weights in one package: SD3.5 Large's nine of these are converted within 3.3 GB."""
BOUND = 2e-3
"""Largest relative error that passes where arithmetic is float32: what half-precision weights may cost."""
DEVICE_BOUND = 5e-2
"""The same where Core ML itself computes, in half precision."""
_LEAST = {"macOS": 15, "iOS": 18, "iPadOS": 18}

Tensors = Mapping[str, torch.Tensor]


def export(artefact: Path, out: Path, *, device: Target, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out` for a device.

    With `artefact/transformer_int4` its integers are kept, else weights are float16.

    Returns the content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, it cannot be for this device, or `out` holds
            something that is not an export.
        ParityError: a package does not compute what its checkpoint computes, or overflows in half precision.
        EdgepruneError: coremltools cannot convert a network.
        DiskError: the disk is full, or `out` cannot be written; the next call goes on from there.
    """
    options = {"device": dataclasses.asdict(device), "coremltools": ct.__version__}
    return write(artefact, out, "coreml", options, lambda work: networks(artefact, work, device, progress))


# ------------------------------------------------------------------------------------- what is refused


def refuse(device: Target) -> None:
    """What the weights must be is asked for every format (accepts.py).

    Raises:
        InputError: a system too old.
    """
    system = re.fullmatch(r"(\w+) (\d+)(?:\.\d+)*", device.requires)
    if system is None or int(system[2]) < _LEAST.get(system[1], sys.maxsize):
        raise InputError(
            f"{device.name}.toml: requires: found {device.requires!r}, expected macOS 15, iOS 18, iPadOS 18 or newer: "
            "4-bit weights in blocks and fused attention begin there"
        )


def generation_for(artefact: Path, device: Target) -> Generation:
    """The artefact's defaults, their size held to what device and position table allow.

    Raises:
        InputError: a size that is not a whole number of tokens.
    """
    generation = Generation.load(artefact)
    config, family = read_config(artefact)
    space = family.latents(config)
    unit = space.patch * _factor(artefact)
    tokens = device.side[1] // unit
    most = min(tokens, space.largest or tokens) * unit
    for field in ("height", "width"):
        if getattr(generation, field) % unit:
            found = getattr(generation, field)
            raise InputError(f"{artefact / 'generation.json'}: {field}: found {found}, expected a multiple of {unit}")
    return dataclasses.replace(generation, height=min(generation.height, most), width=min(generation.width, most))


def _factor(artefact: Path) -> int:
    path = artefact / "vae" / "config.json"
    return latent_factor(read_json(path), path)


# ------------------------------------------------------------------------------------- the networks


def networks(artefact: Path, work: Unfinished, device: Target, progress: Progress) -> dict[str, Any]:
    """Write and compare one network after the other; what else edgeprune_export.json shall say.

    Raises: as `export`.
    """
    refuse(device)
    generation = generation_for(artefact, device)
    generation.save(work.folder)
    tokens = longest_prompt(artefact)
    factor = _factor(artefact)
    height, width = generation.height // factor, generation.width // factor

    if not work.has(name := "transformer"):
        progress(name)
        stored = open_transformer(artefact, quantized=is_quantized(artefact))
        whole = graph.Transformer(stored.running())
        patch = whole.family.latents(whole.model.config).patch
        text = whole.family.text_tokens(tokens, generation.max_sequence_length)
        sizes = {"height": height // patch, "width": width // patch, "tokens": text}
        examples = [whole.example(batch=b, **sizes, seed=b) for b in range(device.batch[0], device.batch[1] + 1)]
        chunks = max(device.chunks, math.ceil(_stored_bytes(artefact) / CHUNK_BYTES))
        parts = split(graph.Transformer(stored.model), chunks, examples[0])
        chunks, loaded = len(parts), _loaded(parts, stored)
        found = _network(name, loaded, whole, examples, work.begin(name), chunks=chunks, progress=progress)
        work.finish(name, {"parity": found, "chunks": chunks})
        del whole, parts, loaded, stored

    for name, kind in text_encoders(artefact).items():
        if work.has(name):
            continue
        progress(name)
        encoder: Any
        encoder, length = to_onnx.text_encoder(artefact, name, kind)
        if kind != T5:
            length = tokens
        if kind == CLIP:
            encoder = TextEncoder(encoder)
        example = encoder.example(batch=1, tokens=length)
        found = _network(name, [encoder], encoder, [example], work.begin(name), half=kind != T5, progress=progress)
        work.finish(name, {"parity": found})
        del encoder

    if not work.has(name := "vae_decoder"):
        progress(name)
        vae = graph.VaeDecoder(from_pretrained(AutoencoderKL.from_pretrained, artefact / "vae"))
        examples = [vae.example(batch=1, height=height, width=width)]
        work.finish(name, {"parity": _network(name, [vae], vae, examples, work.begin(name), progress=progress)})
    chunks = work.said("chunks")["transformer"]
    return {"device": device.name, "batch": list(device.batch), "chunks": chunks, "parity": work.said("parity")}


def _stored_bytes(artefact: Path) -> int:
    weights = artefact / (INT4 if is_quantized(artefact) else HALF)
    return sum(path.stat().st_size for path in weights.glob("*.safetensors"))


class Part(nn.Module):
    """Consecutive blocks of a transformer, the embedders before the first, the output layers after the last.

    `inputs` and `outputs` name what `forward` takes and gives: those of graph.Transformer at both ends, but positions,
    which are constants of the size; between parts the streams of image tokens (B, N, D) and text tokens (B, M, D), and
    from the first part to all others the modulation input (B, D).
    """

    def __init__(self, whole: graph.Transformer, blocks: Sequence[int], index: int, example: Tensors) -> None:
        super().__init__()
        model, self.family = whole.model, whole.family
        self.config, self.grid = model.config, self.family.grid(model, example)
        self.blocks = list(blocks)
        self.first, self.last = blocks[0] == 0, blocks[-1] == len(self.family.blocks(model)) - 1
        # Weights are called in the package as in the checkpoint.
        self.places = [self.family.block_prefix(model, i).rstrip(".").rpartition(".") for i in blocks]
        for name, child in model.named_children():
            if isinstance(child, nn.ModuleList):
                mine = {key: child[int(key)] for list_name, _, key in self.places if list_name == name}
                setattr(self, name, nn.ModuleDict(mine))
            elif self.last if f"{name}.".startswith(self.family.tail) else self.first:
                setattr(self, name, child)
        for i, table in enumerate(self.family.positions(model, example)):
            self.register_buffer(f"positions_{i}", table, persistent=False)
        # No program may call an input and an output the same.
        self.inputs: Sequence[str] = [f"image_tokens_{index}", f"text_tokens_{index}", MODULATION]
        self.outputs: Sequence[str] = [f"image_tokens_{index + 1}", f"text_tokens_{index + 1}"]
        if self.first:
            self.inputs = [name for name in whole.inputs if name not in self.family.position_inputs]
            self.outputs = [*self.outputs, MODULATION]
        if self.last:
            self.outputs = list(whole.outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of `inputs` to those of `outputs`."""
        text: torch.Tensor | None
        if self.first:
            image, text, modulation = self.family.embed(self, dict(zip(self.inputs, tensors, strict=True)))
        else:
            image, text, modulation = tensors
        positions = [buffer for name, buffer in self.named_buffers() if name.startswith("positions_")]
        for list_name, _, key in self.places:
            assert text is not None
            image, text = self.family.run(getattr(self, list_name)[key], image, text, modulation, positions)
        if self.last:
            return (self.family.unembed(self, image, modulation, self.grid),)
        assert text is not None
        return (image, text, modulation) if self.first else (image, text)

    def tensors(self, stored: StoredTransformer) -> list[str]:
        """The checkpoint's names of this part's tensors."""
        blocks = [name for i in self.blocks for name in stored.names(i)]
        outside = [(name, name.startswith(self.family.tail)) for name in stored.names(None)]
        return blocks + [name for name, tail in outside if (self.last if tail else self.first)]


def _loaded(parts: Sequence[Part], stored: StoredTransformer) -> Iterator[Part]:
    """Each part with its weights, which are dropped when the next is asked for."""
    for part in parts:
        stored.fill(part.tensors(stored))
        yield part
        part.to("meta")


def split(whole: graph.Transformer, chunks: int, example: Tensors) -> list[Part]:
    """The transformer in `chunks` parts of about equally many blocks, or as many as it has blocks, for one size."""
    count = len(whole.family.blocks(whole.model))
    blocks = np.array_split(np.arange(count), min(chunks, count))
    return [Part(whole, part.tolist(), i, example) for i, part in enumerate(blocks)]


class TextEncoder(nn.Module):
    """graph.TextEncoder without the states that no pipeline reads: pooled text, the last two states."""

    inputs = tuple(graph.TextEncoder.inputs)

    def __init__(self, encoder: graph.TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        # Core ML allows no dot in a name.
        self.outputs = [name.replace(".", "_") for name in self._read(list(self.encoder.outputs))]
        self.example = self.encoder.example

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, M) to (B, P) and twice (B, M, D)."""
        return tuple(self._read(self.encoder(input_ids)))

    @staticmethod
    def _read(outputs: Sequence[Any]) -> list[Any]:
        return [outputs[0], *outputs[-2:]]


def _network(
    name: str,
    parts: Iterable[Any],
    reference: nn.Module,
    examples: Sequence[Tensors],
    folder: Path,
    *,
    chunks: int = 1,
    half: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Convert, save and compare one network, whose parts run one after the other; computed in half precision or not.

    A part that an earlier run has saved is not converted again.
    """
    graph.widen(reference).requires_grad_(False)
    for layer in reference.modules():
        if not half and isinstance(layer, PackedLinear):  # a program's weights have the precision of their scales
            layer.weight_scale = layer.weight_scale.float()
    batches = [len(next(iter(example.values()))) for example in examples]
    tensors, packages, outputs = dict(examples[-1]), [], []
    for i, part in enumerate(parts, 1):
        path = folder / ("model.mlpackage" if chunks == 1 else f"chunk_{i}.mlpackage")
        feeds, outputs = {key: tensors[key] for key in part.inputs}, list(part.outputs)
        try:
            with _quiet(), torch.no_grad():
                if not path.exists():
                    _save(convert(part, feeds, outputs, batches, half=half), path)
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
            raise EdgepruneError(f"{name}: coremltools cannot convert it: {' '.join(str(error).split())}") from error
        if i < chunks:  # no program depends on the numbers that it is traced with
            tensors |= zip(outputs, _zeros_like_outputs(part, feeds), strict=True)
        packages.append(Prediction(path) if sys.platform == "darwin" else Package(path))
        progress(f"{name}: converted", i, chunks)
    chain = Chain(packages)
    if sys.platform == "darwin":
        record = parity.check(name, chain, reference, examples, outputs, bound=DEVICE_BOUND, progress=progress)
        return record | {"by": "prediction"}
    record = parity.check(name, chain, reference, examples, outputs, bound=BOUND, progress=progress)
    return record | {"by": "mil_reference", "half_relative": _half(name, chain, examples[-1], outputs, progress)}


def _zeros_like_outputs(part: Part, feeds: Tensors) -> list[torch.Tensor]:
    """Zeros of the shapes and types of what a part gives, which need not be computed for that."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = part(*(mode.from_tensor(value) for value in feeds.values()))
    return [torch.zeros(value.shape, dtype=value.dtype) for value in found]


def _save(model: Any, path: Path) -> None:
    """Write a package, there whole or not at all."""
    scratch = path.with_name(SCRATCH + path.name)
    model.save(str(scratch))
    scratch.rename(path)


def _half(name: str, chain: Chain, example: Tensors, outputs: Sequence[str], progress: Progress) -> float:
    """The largest relative error where every value is rounded to half precision: told, and bounded only by finite.

    Against what the chain gave last: the same example in float32, which was compared with the checkpoint's.
    """
    expected = chain.latest
    step = Steps(f"{name}: compared in half precision", chain.steps, progress)
    found = chain.run(outputs, {key: value.numpy() for key, value in example.items()}, half=True, step=step)
    worst = max(parity.relative_error(a, b)[0] for a, b in zip(found, expected, strict=True))
    if not np.isfinite(worst):
        raise ParityError(f"{name}: its activations overflow in half precision, which Core ML computes in")
    return worst


class Chain:
    """Packages run one after the other, each taking by name what is there by then."""

    def __init__(self, packages: Sequence[Package | Prediction]) -> None:
        self.packages = packages
        self.latest: list[NDArray[Any]] = []
        """What the last run gave."""

    @property
    def steps(self) -> int:
        """How many packages run one after the other."""
        return len(self.packages)

    def run(
        self,
        names: Sequence[str] | None,
        feeds: Mapping[str, Any],
        *,
        half: bool = False,
        step: Callable[[], None] = lambda: None,
    ) -> list[NDArray[Any]]:
        """The outputs `names`, or all of the last package; `step` is called after each package."""
        arrays = dict(feeds)
        for package in self.packages:
            taken = {name: arrays[name] for name in package.inputs}
            arrays |= zip(package.outputs, package.run(None, taken, half=half), strict=True)
            step()
        self.latest = [arrays[name] for name in names or self.packages[-1].outputs]
        return self.latest


class Prediction:
    """A package in Core ML itself, on the CPU of a Mac."""

    def __init__(self, path: Path) -> None:
        self._model: Any = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY)
        description = self._model.get_spec().description
        self.inputs, self.outputs = ([v.name for v in part] for part in (description.input, description.output))

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, half: bool = True) -> list[NDArray[Any]]:
        """As Package.run; Core ML always computes in half precision."""
        kinds: dict[str, Any] = {
            name: np.int32 if np.asarray(a).dtype.kind == "i" else np.float32 for name, a in feeds.items()
        }
        found = self._model.predict({name: np.asarray(array, kinds[name]) for name, array in feeds.items()})
        return [np.asarray(found[name], np.float32) for name in names or self.outputs]


# ------------------------------------------------------------------------------------- torch to Core ML

MODULATION = "modulation"
_STREAMS = ("image_tokens_", "text_tokens_", MODULATION)
"""What goes from chunk to chunk stays in half precision; what a caller gives or gets is float32 or int32."""


def convert(
    module: nn.Module, example: Tensors, outputs: Sequence[str], batches: Sequence[int], *, half: bool = True
) -> Any:
    """A coremltools MLModel, not loaded, of `module(*example.values())`, whose first axes are the batch.

    With `half` all but the timestep's angles computes in half precision, else only tables are looked up in it.
    """
    batch = torch.export.Dim("batch", min=min(batches), max=max(batches)) if len(batches) > 1 else None
    dynamic = tuple({0: batch} for _ in example) if batch else None
    program = torch.export.export(
        module,
        tuple(example.values()),
        dynamic_shapes=(dynamic,) if batch and isinstance(module, Part) else dynamic,
        strict=False,
    ).run_decompositions({})
    for node in list(program.graph.nodes):  # coremltools does not know this no-op
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    shapes = {name: [(b, *value.shape[1:]) for b in batches] for name, value in example.items()}
    return ct.convert(
        program,
        inputs=[
            ct.TensorType(
                name=name,
                shape=ct.EnumeratedShapes(shapes[name]) if batch else shapes[name][0],
                dtype=_dtype(name, value),
            )
            for name, value in example.items()
        ],
        outputs=[ct.TensorType(name=name, dtype=_dtype(name)) for name in outputs],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.transform.FP16ComputePrecision(_is_no_angle if half else _is_lookup),
        skip_model_load=True,
    )


def _dtype(name: str, value: torch.Tensor | None = None) -> Any:
    if value is not None and not value.is_floating_point():
        return np.int32
    return np.float16 if name.startswith(_STREAMS) else np.float32


def _is_no_angle(op: Any) -> bool:
    return not _is_angle(op)


def _is_lookup(op: Any) -> bool:
    return bool(op.op_type == "gather")


def _is_angle(op: Any, depth: int = 4) -> bool:
    """Whether an operation is a sine or cosine, or leads to nothing else.

    The timestep goes to 1000, where neighbours in half precision are half a radian apart.
    """
    if op.op_type in ("sin", "cos"):
        return True
    readers = [reader for output in op.outputs for reader in output.child_ops]
    return depth > 0 and bool(readers) and all(_is_angle(reader, depth - 1) for reader in readers)


@register_torch_op(torch_alias=["edgeprune::packed_linear"], override=True)  # type: ignore[untyped-decorator]
def packed_linear(context: Any, node: Any) -> None:
    """The stored integers (O, I) and scales (O, groups) as they are, dequantised by the device."""
    x, packed, scale, bias, bits = _get_inputs(context, node)
    integers = unpack(torch.from_numpy(np.array(packed.val).view(np.uint8)), int(bits.val)).numpy()
    weight = mb.constexpr_blockwise_shift_scale(
        data=integers.astype(types.np_int4_dtype if bits.val == 4 else np.int8),
        scale=scale.val,
        name=packed.name,
    )
    more = {} if bias is None or bias.val is None else {"bias": np.asarray(bias.val, scale.val.dtype)}
    context.add(mb.linear(x=x, weight=weight, name=node.name, **more))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """coremltools draws bars, and warns of the versions in use."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
