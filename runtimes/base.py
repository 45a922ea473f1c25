"""What all runtimes share: a folder's settings, the denoising loop in numpy, and `Runtime`, the object for users.

Each runtime implements a `Backend`: text to embeddings, one velocity, latents to pixels. Noise, guidance, schedule and
images are handled here, so with the same seed two runtimes start from the same latents and use the same sigmas.
Image-to-image, other samplers and previews are not supported.

Shapes: B batch, M text tokens, K joint attention width, P pooled width, C latent channels, h, w latent size, H, W
image size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.files import check_links, read_json
from edgeprune.families import Config, Family, family_of
from edgeprune.runtimes import memory
from edgeprune.runtimes.scheduler import FlowMatchEuler
from edgeprune.sampling.generation import Generation, latent_factor

if TYPE_CHECKING:
    from PIL import Image

Array = NDArray[np.float32]
StepProgress = Callable[[int, int], None]
"""Called after each denoising step with (steps done, total steps)."""


class Backend(Protocol):
    """The interface that a runtime implements. Arrays are float32 unless stated otherwise."""

    name: str
    """The runtime's name: `ort`, `eager`."""
    provider: str
    """Where it computes, in the runtime's own term; in low-memory mode empty until the transformer was opened."""
    why: str
    """Why it computes there: `the only one here`, `provider=cpu`; empty as long as `provider` is."""
    precision: str
    """The format of the transformer's weights: `int4`, `bf16`, `fp32`, ..."""

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encode text to (hidden (B, M, K), pooled (B, P)), with the zero tokens that stand for an absent T5."""
        ...

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """Compute the velocity (B, C, h, w) of latents (B, C, h, w) at noise levels sigma (B) in 0..1.

        `text` is hidden (B, M, K), `pooled` is (B, P). Only models that take the guidance scale as an input read
        `guidance`.
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
    settings = Settings(generation=generation, factor=factor, family=family, config=config)
    check_size(settings, generation.height, generation.width, where=f"{folder / 'generation.json'}: ")
    return settings


def check_size(settings: Settings, height: int, width: int, *, where: str = "") -> None:
    """Refuse an image size that is not a whole number of tokens.

    Raises:
        InputError: height or width is not a positive multiple of factor times patch.
    """
    unit = settings.factor * settings.patch
    for field, value in (("height", height), ("width", width)):
        if value < unit or value % unit:
            raise InputError(f"{where}{field}: found {value}, expected a multiple of {unit}")


def initial_latents(settings: Settings, seeds: Sequence[int], height: int, width: int) -> Array:
    """Draw standard normal latents (B, C, h, w) with one generator per seed: an image never depends on its batch."""
    shape = settings.channels, height // settings.factor, width // settings.factor
    return np.stack([np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds])


def frozen(array: Array) -> Array:
    """Return a read-only view: a runtime may keep it on its device for as long as it gets this same object."""
    view = array.view()
    view.flags.writeable = False
    return view


def denoise(
    backend: Backend,
    scheduler: FlowMatchEuler,
    latents: Array,
    positive: tuple[Array, Array],
    negative: tuple[Array, Array] | None,
    *,
    sigmas: Array,
    guidance_scale: float,
    progress: StepProgress | None = None,
) -> Array:
    """Denoise latents (B, C, h, w); with `negative`, guidance runs as one batch of 2 B.

    Args:
        backend: computes the velocity.
        scheduler: takes the steps.
        latents: the noise to start from.
        positive: hidden (B, M, K) and pooled (B, P) of the prompts.
        negative: the same of the negative prompts, or None for no guidance.
        sigmas: the noise level before each step, then 0.
        guidance_scale: factor on (conditional - unconditional); also the input of models that take it.
        progress: called after each step.
    """
    text, pooled = positive
    if negative is not None:
        # The unconditional half first, as in diffusers.
        text, pooled = np.concatenate([negative[0], text]), np.concatenate([negative[1], pooled])
    text, pooled = frozen(text), frozen(pooled)
    steps = len(sigmas) - 1
    for i in range(steps):
        batch = latents if negative is None else np.concatenate([latents, latents])
        velocity = backend.step(batch, text, pooled, np.full(len(batch), sigmas[i], np.float32), guidance_scale)
        if negative is not None:
            without, with_text = np.split(velocity, 2)
            velocity = without + np.float32(guidance_scale) * (with_text - without)
        latents = scheduler.step(velocity, latents, sigmas[i], sigmas[i + 1])
        if progress is not None:
            progress(i + 1, steps)
    return latents


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """Convert pixels (B, 3, H, W) in -1..1 to (B, H, W, 3) in 0..255."""
    unit = np.clip(pixels * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    out: NDArray[np.uint8] = (unit * 255).round().astype(np.uint8)
    return out


class Runtime:
    """An opened model. Use it as a context manager, or call `close` at the end.

    Example:
        with edgeprune.runtimes.load("out") as model:
            model.generate("two red circles", seed=3)[0].save("out.png")
    """

    def __init__(self, backend: Backend, settings: Settings, scheduler: FlowMatchEuler) -> None:
        self.backend, self.settings, self.scheduler = backend, settings, scheduler

    @property
    def name(self) -> str:
        """The runtime's name: `ort`, `eager`."""
        return self.backend.name

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float = 1.0) -> Array:
        """Compute one velocity; shapes as in `Backend.step`."""
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
        progress: StepProgress | None = None,
    ) -> list[Image.Image]:
        """Generate one image per prompt; an argument of None takes its value from the folder's generation.json.

        Args:
            prompt: one prompt or several, run as one batch.
            negative_prompt: what guidance steers away from, for all prompts; ignored by models that take the scale.
            steps: denoising steps.
            guidance_scale: 1 or less turns guidance off and halves the work. Models that take the scale as an input
                (FLUX.1 dev) always do half the work.
            height: pixels.
            width: pixels.
            seed: one per prompt, or one number s for s, s + 1, ... A seed gives the same noise in every runtime.
            progress: called with (steps done, total steps).

        Raises:
            InputError: no prompt, steps below 1, a seed below 0, different numbers of seeds and prompts, or a bad size.
        """
        from PIL import Image

        latents = self.generate_latents(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            progress=progress,
        )
        # One image at a time: the VAE of 1024x1024 pixels takes more memory than all the rest.
        return [Image.fromarray(to_uint8(self.backend.decode(one[None]))[0]) for one in latents]

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
        progress: StepProgress | None = None,
    ) -> Array:
        """Do what `generate` does up to the VAE, and return latents (B, C, h, w)."""
        settings = self.settings
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("prompt: found an empty list, expected at least one prompt")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise InputError(f"seed: found {len(seeds)} seeds, expected one for each of {len(prompts)} prompts")
        if min(seeds) < 0:
            raise InputError(f"seed: found {min(seeds)}, expected 0 or more")
        steps = settings.generation.num_inference_steps if steps is None else steps
        if steps < 1:
            raise InputError(f"steps: found {steps}, expected 1 or more")
        scale = settings.generation.guidance_scale if guidance_scale is None else guidance_scale
        height = settings.generation.height if height is None else height
        width = settings.generation.width if width is None else width
        check_size(settings, height, width)
        # All prompts at once: low-memory mode opens every text encoder for each call.
        guided = settings.family.guided(settings.config, scale)
        hidden, pooled = self.backend.encode([*prompts, negative_prompt] if guided else prompts)
        positive, negative = (hidden[: len(prompts)], pooled[: len(prompts)]), None
        if guided:
            negative = hidden[-1:].repeat(len(prompts), axis=0), pooled[-1:].repeat(len(prompts), axis=0)
        unit = settings.factor * settings.patch
        tokens = (height // unit) * (width // unit)
        return denoise(
            self.backend,
            self.scheduler,
            initial_latents(settings, seeds, height, width),
            positive,
            negative,
            sigmas=self.scheduler.sigmas(
                steps,
                tokens=tokens,
                levels=settings.family.levels(steps),
                mu=settings.family.shift(tokens, steps),
            ),
            guidance_scale=scale,
            progress=progress,
        )

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


def open_runtime(folder: Path, module: ModuleType, options: dict[str, Any]) -> Runtime:
    """Open a folder; reads the small files first, so that a bad setting fails before gigabytes are loaded.

    Raises:
        InputError: a setting is not usable, or the runtime has no such option.
    """
    accepted = list(inspect.signature(module.open_backend).parameters)[2:]
    if unknown := sorted(set(options) - set(accepted)):
        name = module.__name__.rpartition(".")[2]
        raise InputError(f"{folder}: {name}: option {unknown[0]}: unknown, expected one of {', '.join(accepted)}")
    settings = read_settings(folder)
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = FlowMatchEuler.from_config(read_json(scheduler_path), where=str(scheduler_path))
    return Runtime(module.open_backend(folder, settings, **options), settings, scheduler)
