"""The model that is verified: what its networks compute here, and what the reference computes. Each runs once.

Notation: B prompts, M text tokens, K text width, P pooled width, C latent channels.
"""

from __future__ import annotations

import copy
import functools
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import HALF, INT4
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, Steps
from edgeprune.common.tables import duration
from edgeprune.families import CHANGED
from edgeprune.families.encoders import text_encoders
from edgeprune.families.parts import is_read
from edgeprune.metrics.psnr import decibels
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.model_files import weights_of
from edgeprune.residency.running import check_room, dtype_of, running
from edgeprune.residency.stored import StoredTransformer
from edgeprune.sampling.denoising import Conditioning, decode, denoise, encode_images, noise, sigmas
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.solvers import EULER
from edgeprune.shapes import Meaning, Thing, render
from edgeprune.stages.costs import evaluation_seconds
from edgeprune.stages.memory import Memory
from edgeprune.stages.work import Subject as Drawn
from edgeprune.verify import reference
from edgeprune.verify.peaks import Peak, watched

PROMPTS = ("a blue cross and a cyan ring", "", "the letter X in purple")
"""What is encoded; the step is taken for the first."""
PICTURE = Meaning("color_attribution", (Thing("cross", "blue"), Thing("ring", "cyan")))
"""What the VAE encodes: a scene of shapes world, which the built-in model's VAE can draw, too."""


@dataclass(frozen=True)
class Text:
    """The encoded prompts."""

    found: Conditioning
    expected: Conditioning
    encoders: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """What each encoder says here and in the reference: all of its tensors that are read, in one row."""
    dtypes: dict[str, torch.dtype]
    """What each encoder computes in here."""
    peaks: dict[str, Peak]
    """Of each encoder in the reference."""


@dataclass(frozen=True)
class Step:
    """The change of the latents (1, C, h, w) by the first step of sampling."""

    found: torch.Tensor
    expected: torch.Tensor
    dtype: torch.dtype
    """What the transformer computes in here."""
    peak: Peak
    """Of the transformer in the reference."""


@dataclass(frozen=True)
class RoundTrip:
    """A picture that the VAE has encoded and decoded."""

    psnr: float
    """In dB."""
    dtype: torch.dtype
    peak: Peak


class Subject:
    """A model's folder, and where its networks compute.

    Args:
        folder: an original's or an artefact's.
        compute: where networks compute, in which dtype, and in how much memory.
        generation: steps, guidance, and the size of the image.
        variant: of the weights, see residency/model_files.py.
        progress: called after each block.
        longest_s: refuse steps that take at least so many seconds; None takes any time.
    """

    def __init__(
        self,
        folder: Path,
        compute: Compute,
        generation: Generation,
        variant: str | None,
        progress: Progress,
        longest_s: float | None = None,
    ) -> None:
        self.folder, self.compute, self.generation, self.variant = folder, compute, generation, variant
        self.progress, self.longest_s = progress, longest_s
        self.config, self.family = read_config(folder)

    @property
    def transformers(self) -> list[str]:
        """The subfolders with a transformer's weights: `transformer`, `transformer_int4` or both."""
        return [name for name in (HALF, INT4) if weights_of(self.folder / name, self.variant)]

    @functools.cached_property
    def stored(self) -> dict[str, StoredTransformer]:
        """Structure and weights of the transformer in each subfolder."""
        return {
            subfolder: open_transformer(self.folder, quantized=subfolder == INT4, variant=self.variant)
            for subfolder in self.transformers
        }

    def check_room(self) -> None:
        """Check that the transformers run in the memory that was given.

        Raises:
            InputError: they do not; says how much they take.
        """
        for stored in self.stored.values():
            check_room(stored, self.compute)

    def say_time(self) -> None:
        """Say how long the steps of a large model take at least here, in both dtypes, and in how much memory.

        Raises:
            InputError: they take longer than `longest_s`.
        """
        numbers = sum(map(math.prod, self.family.tensor_shapes(self.config).values()))
        if is_small(numbers) or str(self.config["_class_name"]).startswith(CHANGED):  # its config alone makes no model
            return
        sides = (self.compute, replace(self.compute, wish=torch.float32))
        once = sum(evaluation_seconds(self.family, self.config, self.folder, self.generation, c) for c in sides)
        seconds, size = once * len(self.transformers), f"{self.generation.width}x{self.generation.height}"
        takes = f"verify: the steps take at least {duration(seconds)} at {size} here, on {self.compute.device}"
        shorter = "--height and --width make it shorter"
        if self.longest_s is not None and seconds > self.longest_s:
            raise InputError(f"{takes}; {shorter}; --yes runs it anyway")
        drawn = Drawn(self.folder, self.family, self.config, self.generation)
        needed = Memory(drawn, sides[1]).drawing(1)  # the reference computes in float32
        self.progress(f"{takes}, in {needed / 1e9:.2f} GB of memory or more; {shorter}")

    @functools.cached_property
    def text(self) -> Text:
        """The prompts, encoded by edgeprune's own way through the encoders and by the reference's."""
        self.progress("verify: text encoders, as edgeprune runs them")
        pipe, prompts, length = self._pipeline(None), list(PROMPTS), self.generation.max_sequence_length
        outputs = pipe.outputs(prompts, length)
        found = Conditioning(*pipe.join(outputs, length))
        self.compute.collect()
        self.progress("verify: text encoders, as diffusers runs them")
        original = reference.text_pipeline(self.folder, self.compute.device, self.variant)
        said: dict[str, tuple[Any, dict[str, Any]]] = {}
        with ExitStack() as stack, torch.no_grad():
            peaks = {}
            for name, kind in text_encoders(self.folder).items():
                encoder = getattr(original, name)
                # The reference runs all layers of a language model; values of those that nothing reads do not matter.
                reads = functools.partial(_reads, kind, pipe.states(name))
                peaks[name] = stack.enter_context(watched(encoder, reads))
                encoder.register_forward_hook(functools.partial(_keep, said, name), with_kwargs=True)
            expected = Conditioning(*self.family.encode(original, prompts, length))
        unread = {encoder.name for encoder in self.family.encoders if not encoder.padding}
        encoders = {}
        for name, tensors in outputs.items():
            output, given = said[name]
            wanted = [_tensor(output, key) for key in tensors]
            if name in unread:  # states of padding, which are 0 here
                wanted = [tensor * given["attention_mask"][..., None] for tensor in wanted]
                wanted = [_padded(tensor, like.shape[1]) for tensor, like in zip(wanted, tensors.values(), strict=True)]
            encoders[name] = _row(map(torch.from_numpy, tensors.values())), _row(wanted)
        dtypes = {name: pipe.dtype_of(name) for name in outputs}
        return Text(found, expected, encoders, dtypes, peaks)

    @functools.cached_property
    def steps(self) -> dict[str, Step]:
        """The first step of sampling for the first prompt, by the transformer of each subfolder.

        Both sides get the reference's text and the same noise. Models that guide by a second evaluation take the step
        without it, which would only enlarge the error by the guidance scale.
        """
        return {subfolder: self._step(subfolder) for subfolder in self.transformers}

    @functools.cached_property
    def round_trip(self) -> RoundTrip:
        """The picture after the VAE has encoded and decoded it."""
        self.progress("verify: VAE")
        self.compute.collect()
        pipe, size = self._pipeline(None), (self.generation.width, self.generation.height)
        scene = Image.fromarray(render(PICTURE, np.random.default_rng(0)))
        picture = np.asarray(scene.resize(size, Image.Resampling.BICUBIC))
        with watched(pipe.vae) as peak:
            latents = encode_images(pipe, torch.from_numpy(picture.copy()).permute(2, 0, 1)[None])
            (again,) = decode(pipe, latents)
        return RoundTrip(decibels(picture, again), pipe.vae.dtype, peak)

    def _pipeline(self, transformer: Any) -> StagedPipeline:
        return StagedPipeline(self.folder, transformer, self.compute, self.variant)

    def _step(self, subfolder: str) -> Step:
        text, generation = self.text.expected[:1], self.generation
        scale = 1.0 if self.family.guided(self.config, generation.guidance_scale) else generation.guidance_scale
        stored = copy.deepcopy(self.stored[subfolder])  # a small one is filled in place
        dtype, blocks = dtype_of(stored, self.compute), len(self.family.blocks(stored.model))
        count = Steps(f"verify: one step of {subfolder}", 2 * blocks, self.progress)

        pipe = self._pipeline(running(stored, self.compute, dtype))
        pipe.scheduler = reference.scheduler_of(self.folder)
        shape = (self.family.latents(self.config).channels, *self._sides(pipe.vae_scale_factor))
        start = noise([0], shape).to(self.compute.device)
        plain = replace(generation, guidance_scale=scale, solver=EULER)
        levels = sigmas(pipe, plain, shape)
        for block in self.family.blocks(pipe.transformer):
            block.register_forward_hook(count)
        path = denoise(pipe.transformer, start, levels, text, text, plain)
        next(path)
        found = next(path).latents - start
        factor = pipe.vae_scale_factor
        del pipe, path, stored
        self.compute.collect()

        original = reference.image_pipeline(self.folder, subfolder, self.compute.device, self.variant)
        for block in self.family.blocks(original.transformer):
            block.register_forward_hook(count)
        with watched(original.transformer) as peak:
            after = reference.step(
                original, start, text.hidden, text.pooled, factor=factor, guidance_scale=scale,
                num_inference_steps=generation.num_inference_steps, height=generation.height, width=generation.width,
            )  # fmt: skip
        return Step(found, after - start, dtype, peak)

    def _sides(self, factor: int) -> tuple[int, int]:
        return self.generation.height // factor, self.generation.width // factor


def _reads(kind: str, states: tuple[int, ...], module: str) -> bool:
    """Return whether a module of a text encoder is read, by its name."""
    return is_read(kind, f"{module}.weight", states)


def _keep(said: dict[str, Any], name: str, _: Any, __: Any, given: dict[str, Any], output: Any) -> None:
    """Keep what a text encoder is given by name, and its output, of the first call."""
    said.setdefault(name, (output, given))


def _row(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])


def _tensor(output: Any, key: str) -> torch.Tensor:
    """Return what `StagedPipeline.outputs` calls `key` of a text encoder's output."""
    name, _, index = key.partition(".")
    if name not in output:  # of a language model with its head: the last of its states
        name, index = "hidden_states", "-1"
    found: torch.Tensor = output[name][int(index)] if index else output[name]
    return found


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """Append zeros to states (B, M, K), which a pipeline pads to its longest prompt: (B, length, K)."""
    return torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
