"""Run a pipeline in batches: encode text, denoise latents, decode images, and encode images.

The memory of a batch is bounded: the transformer gets 4096 image tokens, or fewer rows where memory is short, the VAE
one image at a time. Where blocks are read when they run, as many batches as there is room for pass through a block
before the next is read.

A seed gives the same noise as in the runtimes, so images from torch and from a device can be compared. The only options
are prompt, guidance, steps, solver and size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.families import Architecture, Network, family_of_model
from edgeprune.residency.compute import Compute
from edgeprune.residency.running import room_to_run, spare
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import PACKED, any_streamed, computes_like, filled
from edgeprune.sampling.generation import Generation, images_at_once
from edgeprune.sampling.latents import decoded, encoded_mean, scale_of
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.sampling.solvers import SOLVERS, Step, visited
from edgeprune.sampling.together import batches_together, row_bytes, rows_together, sample_bytes

KEEP_S = 30.0
"""Seconds after which an evaluation keeps what it has, or more, so that keeping takes a tenth of the time at most."""
_PAUSE = 10


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


def encode_once(pipe: Any, prompts: list[str], max_sequence_length: int) -> Callable[[list[str]], Conditioning]:
    """Encode all prompts of a run before it draws; return what gives the text of some of them.

    A pipeline of artefact/staged.py reads each encoder once for all, and keeps their text on disk; of others, whose
    encoders are in memory, the text is, too.
    """
    distinct = list(dict.fromkeys(prompts))
    if hasattr(pipe, "encode_ahead"):
        pipe.encode_ahead(distinct, max_sequence_length)
        return lambda some: encode_prompts(pipe, some, max_sequence_length)
    every, rows = encode_prompts(pipe, distinct, max_sequence_length), {text: row for row, text in enumerate(distinct)}
    return lambda some: every[[rows[text] for text in some]]


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


def batches_of(count: int, size: int) -> list[slice]:
    """Return the rows of each batch of at most `size` among `count` samples."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def passes_of(model: Any, generation: Generation) -> int:
    """Return how many rows an image has in a transformer: two with guidance by a second evaluation."""
    family: Architecture = family_of_model(model)
    return 2 if family.guided(model.config, generation.guidance_scale) else 1


def sigmas(pipe: Any, generation: Generation, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the noise level of each evaluation for latents of `shape` (C, h, w), then 0, as the solver visits them."""
    levels = NoiseSchedule.of(pipe, generation.num_inference_steps).sigmas(shape)
    return levels[visited(generation.solver, levels.tolist())]


def velocity(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Evaluate a transformer once: velocity (B, C, h, w) of latents (B, C, h, w) at noise levels (B).

    `model` may be wrapped for training by FSDP, or by DDP or DeepSpeed, which hold it in `module`.
    """
    bare = getattr(model, "module", model)
    network: Network = family_of_model(bare)
    inputs = network_inputs(bare, latents, condition, sigma, guidance)
    out: torch.Tensor = network.velocity(bare.config, network.call(model, inputs), latents.shape)
    return out


def evaluate(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Evaluate a transformer where it is and in its own dtype; return the velocity where and as the latents are.

    Latents and noise levels stay float32 outside of it. In half precision it runs in pieces: `embed` keeps timestep and
    guidance in float32, where FLUX.1's own forward would round them to eight bits. So it does where blocks are read
    when they run, see `evaluate_all`. Where memory is short, rows run in several calls: the halves of guidance in two.

    Args:
        model: the transformer.
        latents: (B, C, h, w).
        condition: encoded prompts, one for each.
        sigma: noise levels (B).
        guidance: guidance scale.
    """
    like = _like(model)
    if like.dtype == torch.float32 and not any_streamed(family_of_model(model).blocks(model)):
        rows = _rows_together(model, latents, condition, len(latents))
        parts = [
            velocity(model, latents[part].to(like), condition[part].to(like), sigma[part].to(like.device), guidance)
            for part in batches_of(len(latents), rows)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(latents)
    (found,) = _in_pieces(model, [(latents, condition, sigma, guidance)])
    return found


def evaluate_all(
    model: Any, batches: Iterable[VelocityInputs], *, spill: Spill | None = None, keys: Sequence[str] = ()
) -> list[torch.Tensor]:
    """Evaluate a transformer for several batches; return the velocities that `evaluate` returns for each, to the bit.

    Where blocks are read when they run, all batches pass through each block before the next is read. `groups` says
    how many have room.

    Args:
        model: the transformer.
        batches: the arguments of `evaluate` after the model. They are taken one at a time.
        spill: on disk, keeps the streams of a model whose blocks are read when they run, every KEEP_S seconds: a run
            after a kill goes on with the block, each batch with its own. None keeps none.
        keys: to keep each batch under. What is kept there stays; the caller drops it.
    """
    if any_streamed(family_of_model(model).blocks(model)):
        return _in_pieces(model, batches, spill if spill is not None and spill.lasts else None, keys)
    return [evaluate(model, *batch) for batch in batches]


@dataclass
class _Passing:
    """A batch on its way through the blocks."""

    key: str
    """To keep it under."""
    latents: torch.Tensor
    """On the meta device: what the velocity looks like."""
    device: torch.device
    """Where the latents are."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Image and text stream and modulation input of the rows that run together."""
    passed: int = 0
    """Blocks that it has passed."""
    kept: int = 0
    """Of these, those after which its streams were kept."""

    def keep(self, spill: Spill) -> None:
        """Keep the streams."""
        image, text = (torch.cat([part[index] for part in self.parts]) for index in (0, 1))
        spill.put(self.key, {"image": image, "text": text, "blocks": torch.tensor(self.passed)})
        self.kept = self.passed

    def go_on(self, kept: dict[str, torch.Tensor]) -> None:
        """Take streams that a run before has kept."""
        rows = [len(vector) for *_, vector in self.parts]
        streams = zip(kept["image"].split(rows), kept["text"].split(rows), self.parts, strict=True)
        self.parts = [(image, text, vector) for image, text, (*_, vector) in streams]
        self.passed = self.kept = int(kept["blocks"])


def _in_pieces(
    model: Any, batches: Iterable[VelocityInputs], spill: Spill | None = None, keys: Sequence[str] = ()
) -> list[torch.Tensor]:
    """Send batches through a transformer block by block; of a streamed one no more rows at once than `at_once` says.

    So the two halves of guidance at 1024x1024 pass a block one after the other. The rows that run together are always
    of one batch, so its numbers do not depend on the others. They are fewer where memory is short.
    """
    network: Network = family_of_model(model)
    blocks, passing = family_of_model(model).blocks(model), list[_Passing]()
    streamed = any_streamed(blocks)
    for (latents, condition, sigma, guidance), key in zip(batches, keys or itertools.repeat(""), strict=False):
        most, parts = min(len(latents), at_once(model, latents.shape)) if streamed else len(latents), []
        most = _rows_together(model, latents, condition, most)
        for start in range(0, len(latents), most):
            rows = slice(start, start + most)
            inputs = model_inputs(model, latents[rows], condition[rows], sigma[rows], guidance)
            if not passing and not start:  # they depend on sizes alone
                positions, grid = network.positions(model, inputs, exact=True), network.grid(model, inputs)
            parts.append(network.embed(model, inputs))
        passing.append(one := _Passing(key, latents.to("meta"), latents.device, parts))
        if spill is not None and key in spill:
            one.go_on(spill.get(key, parts[0][0].device))
    kept_at, took = time.monotonic(), 0.0
    for number, block in enumerate(blocks):
        waiting = [one for one in passing if one.passed <= number]
        with filled(block, following=blocks[(number + 1) % len(blocks)]) if waiting else nullcontext():
            for one in waiting:
                for index, (image, text, vector) in enumerate(one.parts):
                    image, after = network.run(block, image, text, vector, positions)
                    # A block that ends the text stream is the last one.
                    one.parts[index] = image, text if after is None else after, vector
                one.passed += 1
                now, rest = time.monotonic(), any(each.passed < len(blocks) for each in passing)
                if spill is not None and rest and now - kept_at > KEEP_S * max(1.0, _PAUSE * took / KEEP_S):
                    for each in passing:
                        if each.kept < each.passed:
                            each.keep(spill)
                    kept_at = time.monotonic()
                    took = kept_at - now
    found = []
    for one in passing:
        shapes = [(len(image), *one.latents.shape[1:]) for image, *_ in one.parts]
        outputs = [network.unembed(model, image, vector, grid) for image, _, vector in one.parts]
        velocities = [network.velocity(model.config, *each) for each in zip(outputs, shapes, strict=True)]
        found.append(torch.cat(velocities).to(one.device, one.latents.dtype))
        one.parts.clear()
    return found


def _rows_together(model: Any, latents: torch.Tensor, condition: Conditioning, most: int) -> int:
    """Return how many of `most` rows of latents (B, C, h, w) run in one call: those that there is room for."""
    if most == 1:
        return 1
    family: Architecture = family_of_model(model)
    one = row_bytes(family, model.config, latents.shape[1:], condition.hidden.shape[1], _like(model).dtype.itemsize)
    return rows_together(room_to_run(model, most * one), one, most)


def groups(
    pipe: Any, batches: Sequence[slice], shape: Sequence[int], text: int, *, passes: int = 1
) -> Iterator[Sequence[slice]]:
    """Yield batches in groups that `evaluate_all` takes together: as many as the memory has room for now.

    A transformer in memory gains nothing, so there each group is one batch; so it is where the pipeline does not know
    its memory.

    Args:
        pipe: the pipeline.
        batches: rows of the samples, the largest first.
        shape: of one sample's latents (C, h, w).
        text: number of text tokens.
        passes: rows that each sample has in the transformer, two with guidance.
    """
    model, compute = pipe.transformer, getattr(pipe, "compute", None)
    family = family_of_model(model)
    streamed = any_streamed(family.blocks(model))
    while batches:
        count = 1
        if streamed and isinstance(compute, Compute) and len(batches) > 1:
            one = sample_bytes(family, model.config, shape, text, _like(model).dtype.itemsize)
            each = passes * one * (batches[0].stop - batches[0].start)
            count = batches_together(spare(model, compute, each * len(batches)), each, len(batches))
        yield batches[:count]
        batches = batches[count:]


def model_inputs(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> dict[str, torch.Tensor]:
    """Return the inputs of a transformer, where it is and in its own dtype; noise levels stay in float32."""
    like = _like(model)
    return network_inputs(model, latents.to(like), condition.to(like), sigma.to(like.device), guidance)


def _like(model: Any) -> torch.Tensor:
    """Return a tensor that has the device and dtype in which a transformer computes.

    It is one outside blocks, if one is in memory and not packed: in a quantized FLUX.1 only biases, in a FLUX.2 none.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_meta and tensor.is_floating_point() and not name.endswith(PACKED):
            found: torch.Tensor = tensor
            return found
    return computes_like(family_of_model(model).blocks(model))


def network_inputs(
    model: Any, latents: torch.Tensor, condition: Conditioning, sigma: torch.Tensor, guidance: float
) -> dict[str, torch.Tensor]:
    """Return the inputs of a transformer's own forward, by name."""
    network: Network = family_of_model(model)
    inputs = network.inputs(model.config, latents, condition.hidden, condition.pooled, sigma, guidance)
    return {n: v if isinstance(v, torch.Tensor) else torch.tensor(v).to(latents.device) for n, v in inputs.items()}


@dataclass(frozen=True)
class Start:
    """Where a batch of images begins."""

    latents: torch.Tensor
    """Noise (B, C, h, w)."""
    condition: Conditioning
    """Encoded prompts, one per image."""
    key: str = ""
    """To keep it under."""


def denoise(
    transformer: Any,
    latents: torch.Tensor,
    levels: torch.Tensor,
    condition: Conditioning,
    empty: Conditioning,
    generation: Generation,
) -> Iterator[Reached]:
    """Yield what noise (B, C, h, w) becomes at each noise level, the noise first; see `denoise_all`."""
    for (reached,) in denoise_all(transformer, [Start(latents, condition)], levels, empty, generation):
        yield reached


@torch.no_grad()
def denoise_all(
    transformer: Any,
    starts: Sequence[Start],
    levels: torch.Tensor,
    empty: Conditioning,
    generation: Generation,
    *,
    spill: Spill | None = None,
    step: Callable[[], object] = lambda: None,
) -> Iterator[list[Reached]]:
    """Go from noise through the noise levels, with all batches through each block before the next is read.

    Args:
        transformer: the model.
        starts: batches. What is kept of each is found again whatever other batches it is with then.
        levels: noise levels of the evaluations and the last one, see `sigmas`.
        empty: the encoded empty prompt, for guidance by a second evaluation.
        generation: its solver and guidance.
        spill: keeps what is reached at each level, which is not computed again, and see `evaluate_all`. None keeps
            none.
        step: called after each step of a batch.

    Yields:
        What each batch has reached at each level, the noise first.
    """
    architecture: Architecture = family_of_model(transformer)
    scale, solve, sigmas = generation.guidance_scale, SOLVERS[generation.solver], levels.tolist()
    at = [Reached(start.latents) for start in starts]
    yield list(at)
    for index in range(len(sigmas) - 1):
        guided = architecture.guided(transformer.config, scale) and generation.guides(sigmas[index])
        names = [f"{start.key}.{index + 1}" for start in starts]
        todo = []
        for i, name in enumerate(names):
            if spill is None or name not in spill:
                todo.append(i)
                continue
            at[i] = _reached(spill.get(name), starts[i].latents)
            spill.drop(f"{name}.step")
            step()

        def inputs(index: int = index, guided: bool = guided, todo: list[int] = todo) -> Iterator[VelocityInputs]:
            for i in todo:
                x, text = at[i].latents, starts[i].condition
                if guided:
                    x, text = torch.cat([x, x]), empty.like(text) + text
                yield x, text, levels[index].to(x).expand(len(x)), scale

        keys = [f"{names[i]}.step" for i in todo]  # with the level: what is left of another one is not this one's
        velocities = evaluate_all(transformer, inputs(), spill=spill, keys=keys)
        for i, velocity in zip(todo, velocities, strict=True):
            if guided:
                without, with_text = velocity.chunk(2)
                velocity = architecture.guide(without, with_text, scale)
            at[i] = Reached(*solve(Step(sigmas, index, at[i].latents, velocity, at[i].past)))
            if spill is not None:
                past = {f"past.{n}": tensor for n, tensor in enumerate(at[i].past)}
                spill.put(names[i], {"latents": at[i].latents} | past)
                spill.drop(f"{names[i]}.step")
            step()
        yield list(at)


def _reached(kept: dict[str, torch.Tensor], like: torch.Tensor) -> Reached:
    """Return what a run before has kept of a level, where and as `like` is."""
    return Reached(kept["latents"].to(like), tuple(kept[f"past.{n}"].to(like) for n in range(len(kept) - 1)))


@torch.no_grad()
def encode_images(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """Encode uint8 images (S, 3, H, W) to normalised latents (S, C, h, w), the means of the VAE's distributions."""
    if hasattr(pipe, "make_room"):
        pipe.make_room(*images.shape[-2:])
    parts = []
    vae, scale = pipe.vae, scale_of(pipe.vae)
    for image in images.split(1):
        x = image.to(vae.device, vae.dtype) / 127.5 - 1
        parts.append(scale.from_vae(encoded_mean(vae, x).float()))
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> NDArray[np.uint8]:
    """Decode latents (B, C, h, w) to uint8 images (B, H, W, 3)."""
    if hasattr(pipe, "make_room"):
        pipe.make_room(*(side * pipe.vae_scale_factor for side in latents.shape[-2:]))
    images = []
    for scaled in scale_of(pipe.vae).to_vae(latents).split(1):
        pixels = decoded(pipe.vae, scaled.to(pipe.vae.dtype)).float()
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
    tokens, shape = generation.max_sequence_length, latent_shape(pipe, generation)
    text_of = encode_once(pipe, ["", *prompts], tokens)
    empty = text_of([""])
    levels = sigmas(pipe, generation, shape)
    batches = batches_of(len(prompts), at_once(pipe.transformer, shape))
    step, drawn = Steps("steps", len(batches) * (len(levels) - 1), progress), list[NDArray[np.uint8]]()
    passes = passes_of(pipe.transformer, generation)
    for group in groups(pipe, batches, shape, empty.hidden.shape[1], passes=passes):
        texts = [text_of(prompts[rows]) for rows in group]
        starts = [
            Start(noise(seeds[rows], shape).to(text.hidden), text, f"images.{rows.start}")
            for rows, text in zip(group, texts, strict=True)
        ]
        for reached in denoise_all(pipe.transformer, starts, levels, empty, generation, spill=spill, step=step):
            last = reached
        for rows, one in zip(group, last, strict=True):
            key = f"pixels.{rows.start}"  # decoding a large image takes minutes
            if spill is not None and key in spill:
                drawn.append(spill.get(key)["pixels"].numpy())
                continue
            drawn.append(decode(pipe, one.latents))
            if spill is not None:
                spill.put(key, {"pixels": torch.from_numpy(drawn[-1])})
        if hasattr(pipe, "free_vae"):
            pipe.free_vae()
    return np.concatenate(drawn)
