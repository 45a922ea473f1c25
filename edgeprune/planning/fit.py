"""How many bytes of a device's memory are left for the transformer's weights. Torch-free.

Networks are in memory one after the other, as runtimes load them where memory is short: each text encoder, then the
transformer, then the VAE decoder, each with its activations. So the largest counts, not the sum. A runtime may open a
T5 in pieces, and decode in strips (docs/memory.md). Weights are counted
from the headers of the pipeline's files. Activations are estimated from the architecture at the image size of the
generation settings. The runtime's own overhead is not included; only `edgeprune bench` on the device can measure it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.files import read_json
from edgeprune.families import Architecture, Config, Shape, family_of
from edgeprune.families.encoders import LONG, text_encoders
from edgeprune.families.parts import is_read, tensor_of, vae_widths
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT4_WO8, text_precision_of
from edgeprune.residency.model_files import any_weights_of
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.targets import Target

_BYTES = {"float32": 4, "float16": 2}
# Alive at once around an MLP, in widths: both residual streams, their normed copies, and four widths twice (before and
# after the activation function). Attention is fused in every runtime, so there are no N x N scores.
_TRANSFORMER_WIDTHS = 2 + 2 + 8
# Images alive at once around the last up block of the VAE, at its narrowest width: input, normed, convolved and
# residual, where the first convolution still has the width before.
_VAE_IMAGES = 6


PIECEWISE = ("openvino", "ort", "coreml")
"""Runtimes that open a T5 in pieces."""
PIECE_BYTES = 500_000_000
"""Most bytes of a piece of T5-XXL."""
STRIPS = ("openvino", "ort")
"""Runtimes that decode latents in strips."""
STRIP_BYTES = 300_000_000
"""Bytes of a strip's values that are enough for speed."""


@dataclass(frozen=True)
class Fit:
    """The memory of a device, and what each stage takes of it."""

    target: str
    memory_bytes: int
    text_encoder_bytes: int
    """The most weights of a text encoder that are open at one time; its activations are small."""
    vae_decoder_bytes: int
    """Weights and activations."""
    activations_bytes: int
    """Estimate for the transformer."""

    @property
    def transformer_bytes(self) -> int:
        """Bytes left for the transformer's weights."""
        return self.memory_bytes - self.activations_bytes


def fit(source: Path, target: Target, generation: Generation, encoders: str = TEXT_INT4) -> Fit:
    """Return how a pipeline fits a device at the image size of the generation settings.

    Args:
        source: the pipeline's diffusers folder.
        encoders: how a T5 or a Qwen is exported, one of precision.ENCODERS.

    Raises:
        BudgetError: a stage takes more than the device has, or nothing is left for the transformer.
        InputError: a config lacks a field or a file is damaged.
    """
    size = _BYTES[target.activations]
    config, vae = read_json(source / "transformer" / "config.json"), read_json(source / "vae" / "config.json")
    encoders_of = family_of(config, str(source / "transformer" / "config.json")).encoders
    states = {encoder.name: encoder.states for encoder in encoders_of}
    values = vae_activations(vae, generation.height, generation.width) * size
    decoder = sum(map(math.prod, stored_shapes(source / "vae", "decoder.").values()))
    taken = {
        name: _encoder_bytes(source / name, kind, size, target, encoders, states.get(name, ()))
        for name, kind in text_encoders(source).items()
    }
    largest = max(taken, key=lambda name: taken[name])
    optional = any(encoder.optional for encoder in encoders_of if encoder.name == largest)
    result = Fit(
        target=target.name,
        memory_bytes=target.memory_bytes,
        text_encoder_bytes=taken[largest],
        vae_decoder_bytes=decoder * size + (min(values, STRIP_BYTES) if target.runtimes[0] in STRIPS else values),
        activations_bytes=_transformer_activations(config, vae, source, generation) * size,
    )
    stages = {
        "the largest text encoder takes": (
            result.text_encoder_bytes,
            "a pipeline without T5" if optional else "a device with more memory",
        ),
        "the VAE decoder takes": (result.vae_decoder_bytes, "a smaller --height and --width"),
        "the transformer's activations take": (result.activations_bytes, "a smaller --height and --width"),
    }
    for stage, (needed, remedy) in stages.items():
        if needed >= target.memory_bytes:
            raise BudgetError(
                f"--fit {target.name}: {stage} {needed / 1e9:.2f} GB, expected less than its "
                f"{target.memory_bytes / 1e9:.2f} GB; use {remedy}"
            )
    return result


def vae_activations(vae: Mapping[str, Any], height: int, width: int) -> int:
    """Return how many numbers a VAE has alive at once for one image, estimated from its config."""
    widths = vae_widths(vae)
    return int(_VAE_IMAGES * widths[min(1, len(widths) - 1)] * height * width)


def transformer_activations(family: Architecture, config: Config, tokens: int) -> int:
    """Return how many numbers are alive at once in a step, of image and text tokens of all samples together."""
    return _TRANSFORMER_WIDTHS * family.width(config) * tokens


def _transformer_activations(config: dict[str, Any], vae: dict[str, Any], source: Path, generation: Generation) -> int:
    """Return how many numbers are alive at once in a step; guidance may need two samples."""
    family = family_of(config, str(source / "transformer" / "config.json"))
    unit = latent_factor(vae, source / "vae" / "config.json") * family.latents(config).patch
    tokens = math.ceil(generation.height / unit) * math.ceil(generation.width / unit)
    text = family.text_tokens(longest_prompt(source), generation.max_sequence_length)
    samples = 2 if family.guided(config, generation.guidance_scale) else 1
    return transformer_activations(family, config, (tokens + text) * samples)


def _encoder_bytes(folder: Path, kind: str, size: int, target: Target, encoders: str, states: Sequence[int]) -> int:
    """Return the bytes of a text encoder's weights, as an export stores them, that are open at one time.

    Args:
        folder: the encoder's.
        kind: its class.
        size: the bytes of a float.
        target: the device.
        encoders: as of `fit`.
        states: of a language model, the hidden states that are read.
    """
    shapes = read_shapes(folder, kind, states)
    if kind in LONG:
        form = TEXT_INT4_WO8 if encoders == TEXT_INT4 else encoders  # the larger of the two that may be kept
        whole = sum(text_precision_of(name, shape, form).nbytes(shape) for name, shape in shapes.items())
        return min(whole, PIECE_BYTES) if target.runtimes[0] in PIECEWISE else whole
    return sum(map(math.prod, shapes.values())) * size


def read_shapes(folder: Path, kind: str, states: Sequence[int]) -> dict[str, Shape]:
    """Return the shapes of what is read of a text encoder's files, by the names of `part_shapes`.

    Raises:
        InputError: a file is damaged.
    """
    found = stored_shapes(folder).items()
    return {tensor_of(kind, name) or name: shape for name, shape in found if is_read(kind, name, states)}


def stored_shapes(folder: Path, prefix: str = "") -> dict[str, Shape]:
    """Return shape by name of the tensors in a component's safetensors files, read from the headers.

    Raises:
        InputError: a file is damaged.
    """
    names: dict[str, Shape] = {}
    weights = any_weights_of(folder)
    for path in (folder / name for name in (weights.files if weights else ())):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        names[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not readable as safetensors ({error})") from error
    return names
