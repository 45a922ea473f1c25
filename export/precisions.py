"""Measures how far the precisions of an export's runtimes are from float32, for runtimes/precision.py to choose from.

The finished folder runs as a user runs it: its text encoders encode ten prompts, its transformer computes one velocity
of each at a noise level of its own, in float32 and in every other precision. float32 in one runtime is the reference
for all: the networks were just held to the checkpoint in it (parity.py). A precision whose instructions this processor
lacks is not measured, since OpenVINO computes float32 in its place.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import runtimes
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.common.memory import allowed, resident
from edgeprune.common.progress import Progress, Steps
from edgeprune.common.splits import Split
from edgeprune.export.parity import MEMORY
from edgeprune.runtimes.base import Array, Runtime, initial_latents
from edgeprune.runtimes.precision import EXACT, FIELD, fast_here
from edgeprune.sampling.prompts import prompts

PROMPTS = 10
_SIDE = 16
"""Most image tokens on a side: a large image would take minutes, and rounding is per token."""
_LEAST = 2 * 10**9
"""Bytes that are left for networks, however much the process has already."""


def measured(folder: Path, progress: Progress) -> dict[str, Any]:
    """Return content for edgeprune_export.json: per runtime, each precision's distance from float32 by its norm.

    Nothing is returned for weights that are not INT4, or if no network of this size fits; exports then run in float32.

    Args:
        folder: the export, complete with its edgeprune_export.json.
        progress: called after each network that ran.
    """
    exported = read_json(folder / "edgeprune_export.json")
    names = [name for name in runtimes.candidates(folder) if runtimes.RUNTIMES[name].installed()]
    offered = {name: runtimes.prepare(name).offered(exported["target"]) for name in names}
    here = [(name, precision) for name in names for precision in offered[name] if fast_here(precision)]
    if not exported["quantized"] or not here:
        return {}
    step = Steps("precisions: compared with float32", 2 + len(here), progress)
    memory = min(allowed(), max(MEMORY, resident() + _LEAST))
    load = functools.partial(runtimes.load, folder, memory=memory)
    errors: dict[str, dict[str, float]] = {}
    try:
        with load(names[0], precision=EXACT) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt of ours may be too long for a small model
            text = model.backend.encode(prompts(Split.CALIBRATION, PROMPTS))
            step()
            expected, (height, width) = _velocities(model, text), _size(model)
            step()
        for name, precision in here:
            with load(name, precision=precision) as model:
                found = _velocities(model, text)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            errors.setdefault(name, {})[precision] = float(f"{error:.2g}")
            step()
    except InputError as refusal:
        progress(f"precisions: not compared with float32, so this export runs in that: {refusal}")
        return {}
    return {FIELD: errors | {"prompts": PROMPTS, "height": height, "width": width}}


def _size(model: Runtime) -> tuple[int, int]:
    """Return the pixels of the image that is measured: the folder's own, at most _SIDE tokens on a side."""
    settings = model.settings
    most = _SIDE * settings.factor * settings.patch
    return min(settings.generation.height, most), min(settings.generation.width, most)


def _velocities(model: Runtime, text: tuple[Array, Array]) -> Array:
    """Return a velocity of noise for each prompt, each at another level of an image: (PROMPTS, C, h, w)."""
    settings, (height, width) = model.settings, _size(model)
    unit = settings.factor * settings.patch
    tokens = (height // unit) * (width // unit)
    family = settings.family
    sigmas = model.scheduler.sigmas(
        PROMPTS, tokens=tokens, levels=family.levels(PROMPTS), mu=family.shift(tokens, PROMPTS)
    )
    latents = initial_latents(settings, range(PROMPTS), height, width)
    return model.step(latents, *text, sigmas[:-1], settings.generation.guidance_scale)
