"""Measures one variant in this process and prints the figures as JSON on the last line; run.py starts one per variant.

    python -m edgeprune.bench.worker '{"folder": "out", "runtime": "ort", ...}'

The quality images come after the memory is read, so they affect no measurement.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import runtimes
from edgeprune.common.errors import EdgepruneError
from edgeprune.reference import PIPELINE
from edgeprune.runtimes import memory
from edgeprune.runtimes.base import Runtime, Velocity, initial_latents, modulate
from edgeprune.sampling.generation import Generation, GenerationOptions

IMAGES, IMAGES_S = 3, 20.0
"""Generate a full image up to this many times, until together they have taken this many seconds."""
LONG_S = 60.0
"""Seconds of a first step after which no other is spent on warming up: what is set up once takes few of them."""
PROGRESS = 16
"""Quality images between two lines of progress."""


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the measurements of one variant.

    Args:
        spec: folder, runtime (None to choose it, PIPELINE for a reference), options, repeats, warmup, settings of the
            images (steps and others, see `Runtime.generate`), prompt, and for quality: prompts, seeds (one per prompt)
            and images (a .npy path to write).

    Raises:
        EdgepruneError: the folder cannot be used.
    """
    folder = Path(spec["folder"])
    if spec["runtime"] == PIPELINE:
        return _measure_reference(folder, spec)
    name = spec["runtime"] or runtimes.choose(folder)
    runtimes.prepare(name)
    gc.collect()

    began = time.perf_counter()
    with runtimes.load(folder, name, **spec["options"]) as model:
        out: dict[str, Any] = {"load_s": time.perf_counter() - began}
        out |= _steps(model, spec)
        out |= _images(model, spec)
        backend = model.backend
        out |= {"runtime": name, "provider": backend.provider, "provider_why": backend.why}
        out |= {"precision": backend.precision} | _memory(model)
        if spec.get("prompts"):
            np.save(spec["images"], _quality(model, spec))
    return out


def _measure_reference(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Measure a reference by the images that its pipeline draws; its steps are those of these images."""
    from edgeprune.reference.drawing import open_drawer

    drawer = open_drawer(folder, **spec["options"])
    gc.collect()
    began = time.perf_counter()
    with drawer:
        drawer.open()
        out: dict[str, Any] = {"load_s": time.perf_counter() - began, "modulation_s": None}
        out |= _timed(lambda: list(drawer.draw([spec["prompt"]], [0], **spec["settings"])))
        first, *others = drawer.steps_s
        out |= {"first_step_s": first, "steps_s": others or [first]}
        provider, why = str(drawer.compute.device), f"{drawer.reference.pipeline} of diffusers draws it"
        out |= {"runtime": PIPELINE, "provider": provider, "provider_why": why, "precision": drawer.precision}
        out |= _memory(drawer)
        if spec.get("prompts"):
            np.save(spec["images"], _quality(drawer, spec))
    return out


def _memory(model: Any) -> dict[str, Any]:
    """Return the rows of memory of what has drawn."""
    gc.collect()
    now = model.memory()
    out: dict[str, Any] = {row: now[row].bytes if row in now else None for row in (*memory.SPLIT, *memory.ROWS)}
    how = {row: reading.how for row, reading in now.items()}
    return out | {"memory_of": now["peak_bytes"].place, "how": how}


def check(spec: dict[str, Any]) -> dict[str, Any]:
    """Refuse a limit of memory that is too little for images of the size that is measured; nothing is opened.

    Args:
        spec: folder, runtime (or None), options and settings.

    Raises:
        EdgepruneError: the folder cannot be used, or not in so little memory.
    """
    if spec["runtime"] == PIPELINE:
        from edgeprune.reference.drawing import open_drawer

        open_drawer(Path(spec["folder"]), **spec["options"])
        return {}
    with runtimes.plan(Path(spec["folder"]), spec["runtime"], **spec["options"]) as model:
        model.prepare(*(spec["settings"].get(side) for side in ("height", "width")))
    return {}


def _steps(model: Runtime, spec: dict[str, Any]) -> dict[str, Any]:
    """Time single denoising steps of one image as `generate` runs them: with guidance, both halves.

    What a backend computes for all steps before the first is timed apart; it is also part of the time of an image.
    """
    wanted = _generation(model, spec["settings"])
    model.backend.prepare(wanted.height, wanted.width)
    latents = initial_latents(model.settings, [0], wanted.height, wanted.width)
    guided = model.settings.family.guided(model.settings.config, wanted.guidance_scale)
    prompts = ["", spec["prompt"]] if guided else [spec["prompt"]]
    hidden, pooled = model.backend.encode(prompts)
    negative = (hidden[:1], pooled[:1]) if guided else None
    velocity = Velocity(model.backend, (hidden[-1:], pooled[-1:]), negative, wanted, model.settings.family)

    levels, middle = model.sigmas(wanted)[:-1].tolist(), float(np.mean(wanted.guidance_range))
    level = min(levels, key=lambda one: abs(one - middle))  # where guidance acts, if it acts at any
    began = time.perf_counter()
    made = modulate(model.backend, [velocity], levels, wanted.guidance_scale)
    modulation = time.perf_counter() - began if made else None

    def once() -> float:
        began = time.perf_counter()
        velocity(latents, level)
        return time.perf_counter() - began

    first = once()
    for _ in range(spec["warmup"] if first < LONG_S else 0):
        once()
    steps = {"first_step_s": first, "steps_s": [once() for _ in range(spec["repeats"])]}
    return steps | {"modulation_s": modulation}


def _generation(model: Runtime, settings: dict[str, Any]) -> Generation:
    """Return the model's settings with these of `Runtime.generate`."""
    fields = {"num_inference_steps" if name == "steps" else name: value for name, value in settings.items()}
    return model.settings.generation.changed(GenerationOptions(**fields), "bench")


def _images(model: Runtime, spec: dict[str, Any]) -> dict[str, Any]:
    return _timed(lambda: model.generate(spec["prompt"], seed=0, **spec["settings"]))


def _timed(draw: Callable[[], Any]) -> dict[str, Any]:
    """Return the seconds of some images."""
    times: list[float] = []
    while not times or (len(times) < IMAGES and sum(times) < IMAGES_S):
        began = time.perf_counter()
        draw()
        times.append(time.perf_counter() - began)
    return {"images_s": times}


def _quality(model: Any, spec: dict[str, Any]) -> NDArray[np.uint8]:
    """Return one image per prompt and seed, (P, H, W, 3)."""
    images = []
    prompts, seeds = spec["prompts"], spec["seeds"]
    for image in model.draw(prompts, seeds, **spec["settings"]):
        images.append(np.asarray(image))
        if len(images) % PROGRESS == 0 or len(images) == len(prompts):
            print(json.dumps({"progress": [len(images), len(prompts)]}), flush=True)
    return np.stack(images)


def main() -> int:
    """Read the spec from the command line; print the result, or `{"error": ..., "kind": ...}`."""
    try:
        spec = json.loads(sys.argv[1])
        print(json.dumps(check(spec) if spec.get("check") else measure(spec)), flush=True)
    except EdgepruneError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
