"""What all runtimes share: a folder's settings, the denoising loop in numpy, and `Runtime`, the object for users.

Each runtime implements a `Backend`: text to embeddings, one velocity, latents to pixels. Noise, guidance, schedule and
images are handled here, so with the same seed two runtimes start from the same latents and use the same sigmas.
Image-to-image and previews are not supported.

Shapes: B batch, M text tokens, K joint attention width, P pooled width, C latent channels, h, w latent size, H, W
image size.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.files import check_links, read_json
from edgeprune.families import Architecture, Config, Family, family_of
from edgeprune.runtimes import memory
from edgeprune.runtimes.sizes import Sides, exported_sides
from edgeprune.sampling.generation import (
    Generation,
    GenerationOptions,
    check_sides,
    is_distilled,
    latent_factor,
)
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.sampling.solvers import SOLVERS, Step, visited

if TYPE_CHECKING:
    from PIL import Image

GROUP = 8
"""Images that are drawn together, where a batch has fewer: all are denoised before the first is decoded, and networks
that are in memory in turn are opened once for all of them. So many are lost with an interrupted run."""
Array = NDArray[np.float32]
StepProgress = Callable[[int, int], None]
"""Called after each denoising step with (steps done, total steps)."""


class Backend(Protocol):
    """The interface that a runtime implements. Arrays are float32 unless stated otherwise."""

    name: str
    """The runtime's name: `ort`, `eager`."""
    provider: str
    """Where it computes, in the runtime's own term; in little memory empty until the transformer was opened."""
    why: str
    """Why it computes there: `the only one here`, `provider=cpu`; empty as long as `provider` is."""
    precision: str
    """What the transformer computes in, as `precision_of` writes it."""

    def open(self) -> None:
        """Open what stays in memory; otherwise that is done when it first runs."""
        ...

    def prepare(self, height: int, width: int) -> None:
        """Plan the memory for images of this size in pixels, before anything runs.

        Raises:
            InputError: the memory that it was given is too little.
        """
        ...

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encode text to (hidden (B, M, K), pooled (B, P)), with the zero tokens that stand for an absent T5."""
        ...

    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode distinct prompts that `encode` gets next, a few at a time.

        So a runtime whose text encoders are not in memory all the time reads each once for all of them, and keeps the
        encoded text on disk until the next call. Other runtimes do nothing.
        """
        ...

    def modulate(self, pooled: Array, sigma: Array, guidance: float) -> bool:
        """Compute what depends on prompt and noise level alone for the steps to come: pooled (N, P), sigma (N).

        Texts and levels may repeat. The result replaces an earlier one, and stays until text is encoded or an image
        decoded. A backend whose transformer computes it in each step does
        nothing; another one computes in `step` what is not there.

        Returns:
            Whether anything was computed.
        """
        ...

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """Compute the velocity (B, C, h, w) of latents (B, C, h, w) at noise levels sigma (B) in 0..1.

        `text` is hidden (B, M, K), `pooled` is (B, P). Only models that take the guidance scale as an input read
        `guidance`.
        """
        ...

    def largest_batch(self) -> int | None:
        """Return the most rows that `step` takes in one call, or None if it has no limit.

        An engine or a package has such a limit; in little memory this opens the transformer. `encode` takes any
        number of prompts, and `generate` decodes images one at a time.
        """
        ...

    def images_together(self, height: int, width: int, rows: int) -> int:
        """Return how many images of this size in pixels are denoised together, at least one.

        Each has so many rows in `step`, two with guidance. In little memory this may open the transformer.
        """
        ...

    def decode(self, latents: Array) -> Array:
        """Decode the scheduler's final latents (B, C, h, w) to pixels (B, 3, H, W) in -1..1."""
        ...

    def memory(self) -> dict[str, memory.Reading]:
        """Return the rows of memory.SPLIT, for the process or the device with the weights, and optional others."""
        ...

    def close(self) -> None:
        """Release the weights; a second call does nothing."""
        ...


_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8}


def precision_of(activations: str, *, quantized: bool) -> str:
    """Return what a transformer computes in: `fp32`, `fp16`, `bf16`, or of one with INT4 weights `W4A32`, `W4A16`, ...

    Args:
        activations: `fp32`, `fp16`, `bf16` or `int8`.
        quantized: whether its weights are INT4.
    """
    return f"W4A{_BITS[activations]}" if quantized else activations


@dataclass(frozen=True)
class Settings:
    """A folder's settings for running its model."""

    generation: Generation
    """Defaults for steps, guidance and size, and the number of zero tokens."""
    factor: int
    """Pixels per latent pixel."""
    family: Family
    config: Config
    """The transformer's config."""
    distilled: bool = False
    """`is_distilled` of model_index.json."""
    sides: Sides = field(default_factory=dict)
    """The image sizes that the folder was exported for; empty if they are dynamic."""
    compressed: bool = False
    """Whether the folder is an artefact or an export of one, made for the guidance scale of `generation`."""

    def scale(self, given: float | None) -> float:
        """Return the guidance scale that acts if the user gives this one; None is the folder's own.

        Warns in one line where the model ignores the scale, or was compressed at another one that it takes as an input,
        or has learned: projected modulation and distillation know only that one.
        """
        own = self.generation.guidance_scale
        if given is None:
            return own
        scale, why = self.family.heeded(self.config, given, distilled=self.distilled)
        fixed = self.family.takes_guidance(self.config) or not self.family.guided(self.config, own)
        if self.compressed and scale != own and fixed:
            why = f"guidance scale {scale:g}: the model was compressed for {own:g}, and never measured at others"
        if why:
            warnings.warn(why, stacklevel=2)
        return scale

    def tokens(self, height: int, width: int) -> int:
        """Return the tokens of an image of this size in pixels."""
        unit = self.factor * self.patch
        return (height // unit) * (width // unit)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.family.latents(self.config).channels

    @property
    def patch(self) -> int:
        """Latent pixels per token on each side."""
        return self.family.latents(self.config).patch


def read_settings(folder: Path) -> Settings:
    """Read the settings of an export, an artefact or a plain diffusers folder.

    Raises:
        InputError: a config or generation.json lacks a field or holds an impossible value.
    """
    check_links(folder)
    config_path = folder / "transformer" / "config.json"
    config = read_json(config_path)
    decoders = [folder / name / "config.json" for name in ("vae_decoder", "vae")]
    vae_path = next((p for p in decoders if p.exists()), decoders[-1])
    factor = latent_factor(read_json(vae_path), vae_path)
    generation = Generation.load(folder)
    family = family_of(config, str(config_path))
    family.text_widths(config)  # fails here, before gigabytes are loaded
    settings = Settings(
        generation=generation, factor=factor, family=family, config=config, distilled=is_distilled(folder),
        compressed=_is_compressed(folder),
    )  # fmt: skip
    check_size(settings, generation.height, generation.width, where=f"{folder / 'generation.json'}: ")
    return replace(settings, sides=exported_sides(folder, generation, factor))


def _is_compressed(folder: Path) -> bool:
    """Return whether a folder is an artefact or an export of one."""
    export = folder / "edgeprune_export.json"
    return (folder / "edgeprune.json").is_file() or (export.is_file() and read_json(export).get("compressed") is True)


def check_size(settings: Settings, height: int, width: int, *, where: str = "") -> None:
    """Refuse an image size that is not a whole number of tokens, or that the model or the export does not take.

    Raises:
        InputError: see `check_sides`; or a side is outside of the range that the folder was exported for.
    """
    sides = {"height": height, "width": width}
    unit, table = settings.factor * settings.patch, settings.family.latents(settings.config).largest
    check_sides({f"{where}{name}": value for name, value in sides.items()}, unit, table)
    for name, value in sides.items():
        least, most = settings.sides.get(name, (value, value))
        if not least <= value <= most:
            span = f"{least}" if least == most else f"{least} to {most}"
            raise InputError(f"{where}{name}: found {value}, expected {span}, which this export was made for")


def initial_latents(settings: Settings, seeds: Sequence[int], height: int, width: int) -> Array:
    """Draw standard normal latents (B, C, h, w) with one generator per seed: an image never depends on its batch."""
    shape = settings.channels, height // settings.factor, width // settings.factor
    return np.stack([np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds])


def frozen(array: Array) -> Array:
    """Return a read-only view: a runtime may keep it on its device for as long as it gets this same object."""
    view = array.view()
    view.flags.writeable = False
    return view


Text = tuple[Array, Array]
"""Encoded prompts: hidden (B, M, K) and pooled (B, P)."""


class Velocity:
    """The velocity of latents at a noise level, with guidance if there is a negative text.

    Guidance needs two rows per image: one call with both halves, or one call for each half if the backend takes no
    more. At noise levels where it does not act, one row is evaluated. The text arrays are read-only: a runtime may keep
    them on its device as long as it gets the same ones.

    Args:
        backend: computes the velocity.
        positive: the encoded prompts, at most `images_together` of them.
        negative: the same number of encoded negative prompts, or None for no guidance.
        generation: its guidance scale is that of `Architecture.guide`, and the input of models that take it.
        family: the model's.
    """

    def __init__(
        self, backend: Backend, positive: Text, negative: Text | None, generation: Generation, family: Architecture
    ) -> None:
        self._family = family
        self._backend, self._generation, self._scale = backend, generation, generation.guidance_scale
        # The unconditional half first, as in diffusers.
        halves = [positive] if negative is None else [negative, positive]
        rows, most = len(halves) * len(positive[0]), backend.largest_batch()
        self._guided = negative is not None
        if most is None or rows <= most:
            halves = [(np.concatenate([h[0] for h in halves]), np.concatenate([h[1] for h in halves]))]
        self._texts = [(frozen(hidden), frozen(pooled)) for hidden, pooled in halves]
        self._alone = [(frozen(positive[0]), frozen(positive[1]))]

    def conditions(self, sigmas: Sequence[float]) -> tuple[Array, Array]:
        """Return the pooled text (N, P) and the noise level (N) of each row that these levels evaluate."""
        evaluated = [(pooled, sigma) for sigma in sigmas for _, pooled in self._texts_at(sigma)]
        levels = [np.full(len(pooled), sigma, np.float32) for pooled, sigma in evaluated]
        return np.concatenate([pooled for pooled, _ in evaluated]), np.concatenate(levels)

    def _texts_at(self, sigma: float) -> list[Text]:
        """Return the texts of each call of the backend at a noise level."""
        return self._texts if self._guided and self._generation.guides(float(sigma)) else self._alone

    def __call__(self, latents: Array, sigma: float) -> Array:
        """Return the velocity (B, C, h, w) of latents (B, C, h, w) at noise level sigma in 0..1."""
        parts, guided = [], self._guided and self._generation.guides(float(sigma))
        for text, pooled in self._texts_at(sigma):
            batch = np.concatenate([latents] * (len(text) // len(latents)))
            levels = np.full(len(batch), sigma, np.float32)
            parts.append(self._backend.step(batch, text, pooled, levels, self._scale))
        velocity = np.concatenate(parts)
        if not guided:
            return velocity
        without, with_text = np.split(velocity, 2)
        out: Array = self._family.guide(without, with_text, self._scale)
        return out


def modulate(backend: Backend, velocities: Iterable[Velocity], sigmas: Sequence[float], guidance: float) -> bool:
    """Compute for images that are drawn together what does not depend on their latents, see `Backend.modulate`.

    Args:
        backend: computes it.
        velocities: of each batch of images; looked at one by one, so that their texts need not be in memory together.
        sigmas: the noise levels at which they will be evaluated.
        guidance: the scale that they have in common.

    Returns:
        Whether anything was computed.
    """
    pooled, levels = zip(*(velocity.conditions(sigmas) for velocity in velocities), strict=True)
    return backend.modulate(np.concatenate(pooled), np.concatenate(levels), guidance)


def denoise(
    velocity: Velocity, solver: str, latents: Array, sigmas: Array, progress: StepProgress | None = None
) -> Array:
    """Denoise latents (B, C, h, w).

    `modulate` comes first, for all images that are drawn together: otherwise the backend computes in each step what it
    lacks.

    Args:
        velocity: computes one velocity.
        solver: takes the steps, one of solvers.SOLVERS.
        latents: the noise to start from.
        sigmas: the noise level before each step, then 0.
        progress: called after each step.
    """
    steps, levels, past = len(sigmas) - 1, sigmas.tolist(), ()
    for i in range(steps):
        latents, past = SOLVERS[solver](Step(levels, i, latents, velocity(latents, levels[i]), past))
        if progress is not None:
            progress(i + 1, steps)
    return latents


def _part(progress: StepProgress | None, index: int, parts: int) -> StepProgress | None:
    """Return the progress of one of several equal parts of the work."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, parts * total)


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """Convert pixels (B, 3, H, W) in -1..1 to (B, H, W, 3) in 0..255."""
    unit = np.clip(pixels * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    out: NDArray[np.uint8] = (unit * 255).round().astype(np.uint8)
    return out


@dataclass(frozen=True)
class _Wish:
    """Images to draw."""

    prompts: list[str]
    negative: str | None
    """What guidance steers away from; None without guidance."""
    seeds: list[int]
    generation: Generation


class _Encoded:
    """Distinct texts, encoded once."""

    def __init__(self, backend: Backend, texts: list[str]) -> None:
        self._places = {text: place for place, text in enumerate(texts)}
        self._text = backend.encode(texts)

    def __getitem__(self, texts: Sequence[str]) -> Text:
        """Return a row for each of these texts, which may repeat."""
        places = [self._places[text] for text in texts]
        return self._text[0][places], self._text[1][places]


def noise_levels(scheduler: FlowMatch, settings: Settings, generation: Generation) -> Array:
    """Return the noise level of each evaluation of an image, then 0, as the solver visits them."""
    family, steps = settings.family, generation.num_inference_steps
    tokens = settings.tokens(generation.height, generation.width)
    levels = scheduler.sigmas(steps, tokens=tokens, levels=family.levels(steps), mu=family.shift(tokens, steps))
    return levels[visited(generation.solver, levels.tolist())]


class Runtime:
    """An opened model. Use it as a context manager, or call `close` at the end.

    Example:
        with edgeprune.runtimes.load("out") as model:
            model.generate("two red circles", seed=3)[0].save("out.png")
    """

    def __init__(self, backend: Backend, settings: Settings, scheduler: FlowMatch) -> None:
        self.backend, self.settings, self.scheduler = backend, settings, scheduler

    @property
    def name(self) -> str:
        """The runtime's name: `ort`, `eager`."""
        return self.backend.name

    def prepare(self, height: int | None = None, width: int | None = None) -> None:
        """Plan the memory for images of this size in pixels; None for the folder's own.

        Raises:
            InputError: the memory that the runtime was given is too little; says how much suffices.
        """
        own = self.settings.generation
        self.backend.prepare(height or own.height, width or own.width)

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float = 1.0) -> Array:
        """Compute one velocity in one call; shapes as in `Backend.step`, B at most `Backend.largest_batch`."""
        return self.backend.step(latents, text, pooled, sigma, guidance)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        solver: str | None = None,
        guidance_range: tuple[float, float] | None = None,
        progress: StepProgress | None = None,
    ) -> list[Image.Image]:
        """Generate one image per prompt; an argument of None takes its value from the folder's generation.json.

        Args:
            prompt: one prompt or several. They run in batches of at most 4096 image tokens (one image of 1024x1024)
                and as the runtime takes them: an engine or a package has a limit, and guidance takes two rows per
                prompt. Where blocks of the transformer are read when they run, up to 8 images pass through each before
                the next is read. Images are decoded one at a time.
            negative_prompt: what guidance steers away from, for all prompts; ignored with a warning without guidance.
            steps: denoising steps.
            guidance_scale: 1 or less turns guidance off and halves the work. Models that take the scale as an input
                (FLUX.1 dev) always do half the work. A warning tells if the model ignores the scale, or takes it and
                was compressed for another one.
            height: pixels.
            width: pixels.
            seed: one per prompt, or one number s for s, s + 1, ... A seed gives the same noise in every runtime, but
                not the noise of diffusers: NumPy draws it, not torch.
            solver: how a step is taken, one of `sampling.solvers.SOLVERS`.
            guidance_range: the lowest and highest noise level, in 0..1, at which guidance takes its second evaluation.
            progress: called with (steps done, total steps), counted over all batches.

        Raises:
            InputError: no prompt, steps below 1, a seed below 0, different numbers of seeds and prompts, a bad size, an
                unknown solver or an impossible range.
        """
        latents = self.generate_latents(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            solver=solver,
            guidance_range=guidance_range,
            progress=progress,
        )
        return list(self._decoded(latents))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        solver: str | None = None,
        guidance_range: tuple[float, float] | None = None,
    ) -> Iterator[Image.Image]:
        """Yield what `generate` returns for one prompt and seed per image, each group of images as it is finished.

        All prompts are encoded before the first image is drawn, each once, if they are few or the text encoders are
        not in memory all the time; otherwise those of a group at a time.

        Args:
            prompts: one per image.
            seeds: one per image.
            steps: denoising steps; None for the folder's own, as for the other settings.
            height: pixels.
            width: pixels.
            solver: see `generate`.
            guidance_range: see `generate`.

        Raises:
            InputError: see `generate`.
        """
        asked = GenerationOptions(
            num_inference_steps=steps, height=height, width=width, solver=solver, guidance_range=guidance_range
        )
        for latents in self._groups(self._wish(prompts, "", seeds, asked)):
            yield from self._decoded(latents)

    def _decoded(self, latents: Array) -> Iterator[Image.Image]:
        from PIL import Image

        # One at a time: a VAE's activations are the largest of all, and a device's takes no more.
        for one in latents:
            yield Image.fromarray(to_uint8(self.backend.decode(one[None]))[0])

    def generate_latents(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        solver: str | None = None,
        guidance_range: tuple[float, float] | None = None,
        progress: StepProgress | None = None,
    ) -> Array:
        """Do what `generate` does up to the VAE, and return latents (B, C, h, w)."""
        asked = GenerationOptions(
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            solver=solver,
            guidance_range=guidance_range,
        )
        return np.concatenate([*self._groups(self._wish(prompt, negative_prompt, seed, asked), progress)])

    def _wish(
        self, prompt: str | Sequence[str], negative: str, seed: int | Sequence[int], asked: GenerationOptions
    ) -> _Wish:
        """Check what `generate` was asked for, and plan the memory for it."""
        settings = self.settings
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("prompt: found an empty list, expected at least one prompt")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise InputError(f"seed: found {len(seeds)} seeds, expected one for each of {len(prompts)} prompts")
        if min(seeds) < 0:
            raise InputError(f"seed: found {min(seeds)}, expected 0 or more")
        steps = asked.num_inference_steps
        if steps is not None and steps < 1:
            raise InputError(f"steps: found {steps}, expected 1 or more")
        generation = settings.generation.changed(replace(asked, guidance_scale=None), "generate")
        generation = replace(generation, guidance_scale=settings.scale(asked.guidance_scale))
        check_size(settings, generation.height, generation.width)
        self.backend.prepare(generation.height, generation.width)
        guided = settings.family.guided(settings.config, generation.guidance_scale)
        if negative and not guided:
            warnings.warn("negative prompt: ignored, because guidance is off", stacklevel=3)
        if asked.guidance_range is not None and not guided:
            warnings.warn("guidance range: ignored, because guidance takes no second evaluation", stacklevel=3)
        return _Wish(prompts, negative if guided else None, seeds, generation)

    def _groups(self, wish: _Wish, progress: StepProgress | None = None) -> Iterator[Array]:
        """Yield the latents (B, C, h, w) of each group of images that are drawn together, see GROUP.

        Noise, modulation and many different texts are in memory, or on disk, for one group at a time.
        """
        generation, count = wish.generation, len(wish.prompts)
        sigmas = self.sigmas(generation)
        also = [wish.negative] if wish.negative is not None else []
        texts = list(dict.fromkeys([*also, *wish.prompts]))
        few = len(texts) <= len(also) + GROUP
        if few:  # before `images_together`, which may open the transformer
            encoded = _Encoded(self.backend, texts)
        else:
            self.backend.encode_ahead(texts)
        rows = 2 if also else 1
        size = self.backend.images_together(generation.height, generation.width, rows)
        group, parts = size * math.ceil(GROUP / size), math.ceil(count / size)
        for first in range(0, count, group):
            starts = range(first, min(first + group, count), size)
            if not few:
                encoded = _Encoded(self.backend, list(dict.fromkeys([*also, *wish.prompts[first : first + group]])))
            velocity = functools.partial(self._velocity, wish, encoded, size)
            modulate(self.backend, map(velocity, starts), sigmas[:-1].tolist(), generation.guidance_scale)
            done = []
            for start in starts:
                seeds, part = wish.seeds[start : start + size], _part(progress, start // size, parts)
                noise = initial_latents(self.settings, seeds, generation.height, generation.width)
                done.append(denoise(velocity(start), generation.solver, noise, sigmas, part))
            yield np.concatenate(done)

    def _velocity(self, wish: _Wish, encoded: _Encoded, size: int, start: int) -> Velocity:
        """Return the velocity of a batch: at most `size` images, from one image on."""
        prompts = wish.prompts[start : start + size]
        negative = None if wish.negative is None else encoded[[wish.negative] * len(prompts)]
        return Velocity(self.backend, encoded[prompts], negative, wish.generation, self.settings.family)

    def sigmas(self, generation: Generation) -> Array:
        """Return the noise level of each evaluation of an image, then 0."""
        return noise_levels(self.scheduler, self.settings, generation)

    def memory(self) -> dict[str, memory.Reading]:
        """Return the same rows on every device, each with a description of how it was measured.

        They are `peak_bytes` and its parts `runtime_overhead_bytes`, `weights_bytes`, `activations_bytes`, and the
        system's current figures for this process (`rss_bytes`, on Linux `anon_bytes`, ...). Call it after the first
        image: before, there are no activations. A row that cannot be measured here is absent.
        """
        return memory.read() | self.backend.memory()

    def close(self) -> None:
        """Release the weights."""
        self.backend.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def plan_runtime(folder: Path, module: ModuleType, options: dict[str, Any]) -> Runtime:
    """Read a folder's settings and plan its memory; nothing large is opened, see `Backend.open`.

    Raises:
        InputError: a setting is not usable, the runtime has no such option, or the memory is too little for any image.
    """
    accepted = list(inspect.signature(module.open_backend).parameters)[2:]
    if unknown := sorted(set(options) - set(accepted)):
        name = module.__name__.rpartition(".")[2]
        raise InputError(f"{folder}: {name}: option {unknown[0]}: unknown, expected one of {', '.join(accepted)}")
    settings = read_settings(folder)
    scheduler = FlowMatch.load(folder)
    return Runtime(module.open_backend(folder, settings, **options), settings, scheduler)
