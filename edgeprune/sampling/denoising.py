"""Run a pipeline in batches: encode text, denoise latents, decode images, and encode images.

The memory of a batch is bounded: the transformer gets 4096 image tokens, the VAE one image at a time.

A seed gives the same noise as in the runtimes, so images from torch and from a device can be compared. The only options
are prompt, guidance, steps, solver and size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.families import Architecture, Network, family_of_model
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import PACKED, filled, is_streamed
from edgeprune.sampling.generation import Generation, images_at_once, latent_scale
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.sampling.solvers import SOLVERS, Step

KEEP_S = 30.0
"""Seconds after which an evaluation keeps what it has."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts. B prompts, M text tokens."""

    hidden: torch.Tensor
    """(B, M, K)."""
    pooled: torch.Tensor
    """(B, P)."""

    def like(self, other: Conditioning) -> Conditioning:
        """Return this one prompt as often as `other` has prompts."""
        return Conditioning(self.hidden.expand_as(other.hidden), self.pooled.expand_as(other.pooled))

    def __getitem__(self, rows: Any) -> Conditioning:
        """Select prompts."""
        return Conditioning(self.hidden[rows], self.pooled[rows])

    def __add__(self, other: Conditioning) -> Conditioning:
        """Return the prompts of both."""
        return Conditioning(torch.cat([self.hidden, other.hidden]), torch.cat([self.pooled, other.pooled]))

    def to(self, reference: torch.Tensor) -> Conditioning:
        """Convert to the device and dtype of `reference`."""
        return Conditioning(self.hidden.to(reference), self.pooled.to(reference))


@dataclass(frozen=True)
class Reached:
    """What a run has at a noise level."""

    latents: torch.Tensor
    """(B, C, h, w)."""
    past: tuple[torch.Tensor, ...] = ()
    """What the solver needs for the next step, each (B, C, h, w)."""


VelocityInputs = tuple[torch.Tensor, Conditioning, torch.Tensor, float]
"""The arguments of `velocity` after the model: latents, condition, sigma, guidance."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str], max_sequence_length: int, *, batch: int = 64) -> Conditioning:
    """Encode prompts with the encoders of a pipeline of diffusers, or of artefact/staged.py."""
    if hasattr(pipe, "encode"):
        return Conditioning(*pipe.encode(prompts, max_sequence_length))
    network: Network = family_of_model(pipe.transformer)
    parts = [network.encode(pipe, prompts[i : i + batch], max_sequence_length) for i in range(0, len(prompts), batch)]
    hidden, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
    return Conditioning(hidden, pooled)


def encode_with_empty(pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[Conditioning, Conditioning]:
    """Encode prompts, and the empty one that guidance evaluates: no encoder is read twice."""
    both = encode_prompts(pipe, ["", *prompts], max_sequence_length)
    return both[1:], both[:1]


def encode_pooled(pipe: Any, prompts: list[str], max_sequence_length: int) -> torch.Tensor:
    """Return only the pooled text (B, P); where that is possible without the encoders of the hidden text."""
    if hasattr(pipe, "pooled"):
        pooled: torch.Tensor = pipe.pooled(prompts)
        return pooled
    return encode_prompts(pipe, prompts, max_sequence_length).pooled


def noise(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Draw standard normal noise with one seed per image: (len(seeds), *shape), float32."""
    return torch.from_numpy(
        np.stack([np.random.default_rng(s).standard_normal(shape, dtype=np.float32) for s in seeds])
    )


def latent_shape(pipe: Any, generation: Generation) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of one image's latents."""
    factor = pipe.vae_scale_factor
    channels = family_of_model(pipe.transformer).latents(pipe.transformer.config).channels
    return channels, generation.height // factor, generation.width // factor


def at_once(model: Any, shape: tuple[int, ...]) -> int:
    """Return how many latents of `shape` (C, h, w) pass through a transformer together, see images_at_once."""
    family: Architecture = family_of_model(model)
    tokens = shape[-1] * shape[-2] // family.latents(model.config).patch ** 2
    return images_at_once(tokens)


def sigmas(pipe: Any, steps: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the scheduler's noise levels for latents of `shape` (C, h, w): (steps + 1), from high to 0."""
    return NoiseSchedule.of(pipe, steps).sigmas(shape)


def velocity(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Evaluate a transformer once: velocity (B, C, h, w) of latents (B, C, h, w) at noise levels (B).

    `model` may be wrapped for training by FSDP, or by DDP or DeepSpeed, which hold it in `module`.
    """
    bare = getattr(model, "module", model)
    network: Network = family_of_model(bare)
    inputs = network_inputs(bare, latents, condition, sigma, guidance)
    output = model(**inputs, return_dict=False)[0]
    out: torch.Tensor = network.velocity(bare.config, output, latents.shape)
    return out


def evaluate(
    model: Any,
    latents: torch.Tensor,
    condition: Conditioning,
    sigma: torch.Tensor,
    guidance: float,
    *,
    spill: Spill | None = None,
    key: str = "",
) -> torch.Tensor:
    """Evaluate a transformer where it is and in its own dtype; return the velocity where and as the latents are.

    Latents and noise levels stay float32 outside of it. In half precision it runs in pieces: `embed` keeps timestep and
    guidance in float32, where FLUX.1's own forward would round them to eight bits. Where blocks are read when they run,
    memory is short: of more samples than run together, such as the two halves of guidance at 1024x1024, one part after
    the other passes through each block.

    Args:
        model: the transformer.
        latents: (B, C, h, w).
        condition: encoded prompts, one for each.
        sigma: noise levels (B).
        guidance: guidance scale.
        spill: on disk, keeps the streams of a model whose blocks are read when they run, every KEEP_S seconds: a run
            after a kill goes on with the block. None keeps none.
        key: to keep them under.
    """
    like, blocks = _like(model), family_of_model(model).blocks(model)
    most = at_once(model, latents.shape) if any(map(is_streamed, blocks)) else len(latents)
    spill = spill if spill is not None and spill.lasts and any(map(is_streamed, blocks)) else None
    if like.dtype == torch.float32 and len(latents) <= most and spill is None:
        return velocity(model, latents.to(like), condition.to(like), sigma.to(like.device), guidance).to(latents)
    network: Network = family_of_model(model)
    inputs = model_inputs(model, latents, condition, sigma, guidance)
    image, text_stream, modulation = network.embed(model, inputs)
    positions = network.positions(model, inputs)
    streams = list(zip(image.split(most), text_stream.split(most), modulation.split(most), strict=True))
    begin, kept_at = 0, time.monotonic()
    if spill is not None and key in spill:
        found = spill.get(key, image.device)
        begin = int(found["blocks"])
        parts = zip(found["image"].split(most), found["text"].split(most), modulation.split(most), strict=True)
        streams = list(parts)
    for number, (block, following) in enumerate(itertools.zip_longest(blocks, blocks[1:])):
        if number < begin:
            continue
        with filled(block, following=following) if len(streams) > 1 else nullcontext():
            for index, (part, text, vector) in enumerate(streams):
                part, after = network.run(block, part, text, vector, positions)
                # A block that ends the text stream is the last one.
                streams[index] = part, text if after is None else after, vector
        if spill is not None and following is not None and time.monotonic() - kept_at > KEEP_S:
            done = {"image": torch.cat([part for part, *_ in streams]), "text": torch.cat([t for _, t, _ in streams])}
            spill.put(key, done | {"blocks": torch.tensor(number + 1)})
            kept_at = time.monotonic()
    image = torch.cat([part for part, *_ in streams])
    output = network.unembed(model, image, modulation, network.grid(model, inputs))
    out: torch.Tensor = network.velocity(model.config, output, latents.shape)
    if spill is not None:
        spill.drop(key)
    return out.to(latents)


def model_inputs(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> dict[str, torch.Tensor]:
    """Return the inputs of a transformer, where it is and in its own dtype; noise levels stay in float32."""
    like = _like(model)
    return network_inputs(model, latents.to(like), condition.to(like), sigma.to(like.device), guidance)


def _like(model: Any) -> torch.Tensor:
    """Return a tensor of a transformer that is in memory: it has the device and dtype to compute with.

    Where all blocks are read when they run, a quantized FLUX.1 has no parameter in memory, but biases.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    found: torch.Tensor = next(
        t for name, t in tensors if not t.is_meta and t.is_floating_point() and not name.endswith(PACKED)
    )
    return found


def network_inputs(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> dict[str, torch.Tensor]:
    """Return the inputs of a transformer's own forward, by name."""
    network: Network = family_of_model(model)
    inputs = network.inputs(model.config, latents, condition.hidden, condition.pooled, sigma, guidance)
    return {n: v if isinstance(v, torch.Tensor) else torch.tensor(v).to(latents.device) for n, v in inputs.items()}


@torch.no_grad()
def denoise(
    transformer: Any,
    latents: torch.Tensor,
    levels: torch.Tensor,
    condition: Conditioning,
    empty: Conditioning,
    generation: Generation,
    *,
    begun: Sequence[Reached] = (),
    spill: Spill | None = None,
    key: str = "",
) -> Iterator[Reached]:
    """Go from noise (B, C, h, w) through the noise levels.

    Args:
        transformer: the model.
        latents: noise (B, C, h, w).
        levels: noise levels (steps + 1), from high to low.
        condition: encoded prompts, one per image.
        empty: the encoded empty prompt, for guidance by a second evaluation.
        generation: its solver and guidance.
        begun: what was reached before, at the first levels; empty begins with the noise.
        spill: see `evaluate`.
        key: see `evaluate`.

    Yields:
        What is reached at each level that is not in `begun`, the noise first.
    """
    architecture: Architecture = family_of_model(transformer)
    scale, solve, sigmas = generation.guidance_scale, SOLVERS[generation.solver], levels.tolist()
    both = empty.like(condition) + condition
    at = begun[-1] if begun else Reached(latents)
    if not begun:
        yield at
    for index in range(max(0, len(begun) - 1), len(sigmas) - 1):
        guided = architecture.guided(transformer.config, scale) and generation.guides(sigmas[index])
        x = torch.cat([at.latents, at.latents]) if guided else at.latents
        text = both if guided else condition
        velocity = evaluate(transformer, x, text, levels[index].to(x).expand(len(x)), scale, spill=spill, key=key)
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + scale * (conditional - unconditional)
        at = Reached(*solve(Step(sigmas, index, at.latents, velocity, at.past)))
        yield at


def denoised(
    transformer: Any,
    latents: torch.Tensor,
    levels: torch.Tensor,
    condition: Conditioning,
    empty: Conditioning,
    generation: Generation,
    *,
    spill: Spill,
    key: str,
    step: Callable[[], object],
) -> list[torch.Tensor]:
    """Return the latents (B, C, h, w) at each noise level, the first as they were given; see `denoise`.

    Args:
        transformer: the model.
        latents: noise (B, C, h, w).
        levels: noise levels, from high to low.
        condition: encoded prompts, one per image.
        empty: the encoded empty prompt.
        generation: its solver and guidance.
        spill: keeps what is reached at each level. What that it has are not computed again.
        key: to keep it under.
        step: called after each step.
    """
    found = [Reached(latents)]
    while len(found) < len(levels) and (name := f"{key}.{len(found)}") in spill:
        kept = spill.get(name)
        past = (kept[f"past.{i}"].to(latents) for i in range(len(kept) - 1))
        found.append(Reached(kept["latents"].to(latents), tuple(past)))
        step()
    rest = denoise(
        transformer, latents, levels, condition, empty, generation, begun=tuple(found), spill=spill, key=f"{key}.step"
    )
    for reached in rest:
        kept = {"latents": reached.latents} | {f"past.{i}": tensor for i, tensor in enumerate(reached.past)}
        spill.put(f"{key}.{len(found)}", kept)
        found.append(reached)
        step()
    return [reached.latents for reached in found]


@torch.no_grad()
def encode_images(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """Encode uint8 images (S, 3, H, W) to normalised latents (S, C, h, w), the means of the VAE's distributions."""
    if hasattr(pipe, "make_room"):
        pipe.make_room(*images.shape[-2:])
    parts = []
    vae, (scaling, shift) = pipe.vae, latent_scale(pipe.vae.config)
    for image in images.split(1):
        x = image.to(vae.device, vae.dtype) / 127.5 - 1
        parts.append((vae.encode(x).latent_dist.mean.float() - shift) * scaling)
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> NDArray[np.uint8]:
    """Decode latents (B, C, h, w) to uint8 images (B, H, W, 3)."""
    scaling, shift = latent_scale(pipe.vae.config)
    if hasattr(pipe, "make_room"):
        pipe.make_room(*(side * pipe.vae_scale_factor for side in latents.shape[-2:]))
    images = []
    for scaled in (latents / scaling + shift).split(1):
        pixels = pipe.vae.decode(scaled.to(pipe.vae.dtype)).sample.float()
        images.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def generate(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    generation: Generation,
    *,
    spill: Spill | None = None,
    progress: Progress = silent,
) -> NDArray[np.uint8]:
    """Draw one image per prompt and seed: (P, H, W, 3) uint8.

    Args:
        pipe: the pipeline.
        prompts: one per image.
        seeds: one per image.
        generation: size, steps and guidance.
        spill: keeps the latents after each step, and the images, so that a run after a kill goes on with them; None
            keeps none.
        progress: called after each step.
    """
    condition, empty = encode_with_empty(pipe, prompts, generation.max_sequence_length)
    shape = latent_shape(pipe, generation)
    levels, batch = sigmas(pipe, generation.num_inference_steps, shape), at_once(pipe.transformer, shape)
    images, starts = [], range(0, len(prompts), batch)
    step, spill = Steps("steps", len(starts) * (len(levels) - 1), progress), spill or Spill()
    for start in starts:
        rows = slice(start, start + batch)
        *_, latents = denoised(
            pipe.transformer, noise(seeds[rows], shape).to(condition.hidden), levels, condition[rows], empty,
            generation, spill=spill, key=f"images.{start}", step=step,
        )  # fmt: skip
        drawn = f"pixels.{start}"  # decoding a large image takes minutes
        if drawn not in spill:
            spill.put(drawn, {"pixels": torch.from_numpy(decode(pipe, latents))})
        images.append(spill.get(drawn)["pixels"].numpy())
    return np.concatenate(images)
