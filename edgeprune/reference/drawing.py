"""Draws with a reference: its pipeline's own call, one image at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.reference.folder import PIPELINE, Reference, open_reference
from edgeprune.reference.pipeline import Loaded, check_room, dtype_of, load, pipeline_class, takes, vendors
from edgeprune.residency.compute import Compute, name_of
from edgeprune.runtimes.eager import rows_of
from edgeprune.runtimes.memory import Meter, Reading, read
from edgeprune.sampling.generation import GenerationOptions

GROUP = 8
"""Images whose text is encoded together, where the text encoder is not in memory all the time."""


class Drawer:
    """A reference that draws. Use it as a context manager, or call `close` at the end.

    Example:
        with open_drawer(Path("sana-sprint")) as drawer:
            for image in drawer.draw(["two red circles"], [3]):
                image.save("out.png")
    """

    name = PIPELINE

    def __init__(self, reference: Reference, compute: Compute) -> None:
        self.reference, self.compute = reference, compute
        self._loaded: Loaded | None = None
        self._meter = Meter()
        self._rows = self._meter.rows
        self.steps_s: list[float] = []
        """Seconds of each denoising step so far, from the scheduler's one to its next."""

    @property
    def precision(self) -> str:
        """What the pipeline computes in: fp32, fp16 or bf16."""
        return name_of(dtype_of(self.reference, self.compute))

    def open(self) -> Any:
        """Load the pipeline, unless it is there, and return it.

        Raises:
            InputError: see `load` in pipeline.py.
        """
        if self._loaded is None:
            with self._meter.opening():
                self._loaded = load(self.reference, self.compute)
            self._rows = rows_of(self.compute.device, self._meter)
            _time_steps(self._loaded.pipe.scheduler, self.steps_s)
        return self._loaded.pipe

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[Image.Image]:
        """Yield one image per prompt and seed, each as it is finished.

        A seed is that of a generator of torch on the CPU, on any device. The noise is the pipeline's own, so at an
        equal seed it is not that of another model.

        Args:
            prompts: one per image.
            seeds: one per image.
            steps: denoising steps; None for those of generation.json, else the pipeline's default; so for the others.
            guidance_scale: how far images follow the prompt.
            height: pixels.
            width: pixels.

        Raises:
            InputError: the pipeline does not take a setting, or cannot draw with it.
        """
        asked = GenerationOptions(steps, guidance_scale, height, width)
        settings = settings_of(self.reference, asked)
        self.open()
        for first in range(0, len(prompts), GROUP):
            texts, numbers = prompts[first : first + GROUP], seeds[first : first + GROUP]
            calls = [self._call(text, seed, settings) for text, seed in zip(texts, numbers, strict=True)]
            if self._loaded and self._loaded.turns:
                with vendors(self.reference.folder, "draw"):
                    self._loaded.turns.encode(calls)
            for call in calls:
                with vendors(self.reference.folder, "draw"):
                    (image,) = call().images
                if not isinstance(image, Image.Image):
                    raise InputError(f"{self.reference.folder}: {self.reference.pipeline} draws no image")
                yield image

    def _call(self, prompt: str, seed: int, settings: dict[str, Any]) -> Callable[[], Any]:
        pipe = self.open()
        return lambda: pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **settings)

    def memory(self) -> dict[str, Reading]:
        """Return the rows of runtimes/memory.py, for this process or for the GPU."""
        return read() | self._rows()

    def close(self) -> None:
        """Release the weights."""
        self._loaded = None
        self.compute.collect()

    def __enter__(self) -> Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _time_steps(scheduler: Any, seconds: list[float]) -> None:
    """Let a pipeline's scheduler note how long each step took: all that happens from one call of it to the next."""
    began = 0.0

    def then(method: Callable[..., Any], *, ends: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal began
            result = method(*args, **kwargs)
            now = time.perf_counter()
            if ends:
                seconds.append(now - began)
            began = now
            return result

        return timed

    scheduler.set_timesteps = then(scheduler.set_timesteps, ends=False)
    scheduler.step = then(scheduler.step, ends=True)


def open_drawer(folder: Path, *, variant: str | None = None, device: str = "auto", memory: int | None = None) -> Drawer:
    """Check a reference's folder, and return what draws with it; nothing large is loaded before it draws.

    Args:
        folder: the pipeline's.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        memory: most bytes of the process, on a GPU of the GPU: parts then take turns; None takes most of what is free.

    Raises:
        InputError: the folder is not usable, torch does not find the device, or memory is too little.
    """
    reference, compute = open_reference(folder, variant), Compute.of(ComputeOptions(device, memory))
    pipeline_class(reference)
    settings_of(reference, GenerationOptions())
    check_room(reference, compute)
    return Drawer(reference, compute)


def settings_of(reference: Reference, asked: GenerationOptions) -> dict[str, Any]:
    """Return the arguments of the pipeline's call: what was asked for, else what generation.json sets.

    Raises:
        InputError: the pipeline does not take one of them.
    """
    settings, taken = reference.own.given() | asked.given(), takes(pipeline_class(reference))
    for name in settings:
        if name not in taken:
            raise InputError(f"{reference.folder}: {reference.pipeline} takes no {name}")
    # SanaSprintPipeline has a level between its two steps, and refuses it with any other number of them.
    if "intermediate_timesteps" in taken and settings.get("num_inference_steps", 2) != 2:
        settings["intermediate_timesteps"] = None
    return settings
