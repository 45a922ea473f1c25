"""Measures how far OpenVINO's precisions of an export are from float32, for runtimes/precision.py to choose from.

The finished folder runs as a user runs it: its text encoders encode ten prompts, its transformer computes one velocity
of each at a noise level of its own, in float32 and in every other precision. Latents at a level are where one Euler
step from noise leads: with noise alone less error was found than an image meets. float32 is the reference: the networks
were just held to the checkpoint in it (parity.py). A precision whose instructions this processor lacks is not measured,
since OpenVINO computes float32 in its place.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune import runtimes
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.common.memory import allowed, resident
from edgeprune.common.progress import Progress, Steps
from edgeprune.common.splits import Split
from edgeprune.export.parity import MEMORY
from edgeprune.export.text import largest
from edgeprune.runtimes.base import Array, Runtime, initial_latents, noise_levels
from edgeprune.runtimes.precision import EXACT, FIELD, lacking
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import prompts

PROMPTS = 10
_RUNTIME = "openvino"
_SIDE, _TEXT = 8, 128
"""Most image tokens on a side, and most tokens of a text: rounding is per token, and more would take minutes."""
_LEAST = 2 * 10**9
"""Bytes that are left for networks, however much the process has already."""


def measured(folder: Path, progress: Progress) -> dict[str, Any]:
    """Return content for edgeprune_export.json: each precision's distance from float32, as a share of its norm.

    Nothing is returned where OpenVINO is not installed, for weights that are not INT4, or if no network fits into
    memory; the export then runs in float32.

    Args:
        folder: the export, complete with its edgeprune_export.json.
        progress: called after each network that ran.
    """
    exported = read_json(folder / "edgeprune_export.json")
    if not exported["quantized"] or not runtimes.RUNTIMES[_RUNTIME].installed():
        return {}
    here = [name for name in runtimes.prepare(_RUNTIME).offered(exported["target"]) if not lacking(name)]
    if not here:
        return {}
    step = Steps("precisions: compared with float32", 3 + len(here), progress)
    memory = min(allowed(), max(MEMORY, resident() + _LEAST))
    load = functools.partial(runtimes.load, folder, _RUNTIME, memory=memory)
    errors = {}
    try:
        with load(precision=EXACT) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt of ours may be too long for a small model
            text = _largest(*model.backend.encode(prompts(Split.CALIBRATION, PROMPTS)))
            step()
            sigmas, latents = _levels(model), _noise(model)
            first = _velocities(model, text, latents, np.full_like(sigmas, sigmas[0]))
            latents = latents + (sigmas - sigmas[0])[:, None, None, None] * first
            step()
            expected, (height, width) = _velocities(model, text, latents, sigmas), _size(model)
            step()
        for name in here:
            with load(precision=name) as model:
                found = _velocities(model, text, latents, sigmas)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            if np.isfinite(error):  # one that overflows is no choice
                errors[name] = float(f"{error:.2g}")
            step()
    except InputError as refusal:
        progress(f"precisions: not compared with float32, so this export runs in that: {refusal}")
        return {}
    sizes = {"prompts": PROMPTS, "height": height, "width": width, "text_tokens": text[0].shape[1]}
    return {FIELD: {_RUNTIME: errors} | sizes}


def _largest(hidden: Array, pooled: Array) -> tuple[Array, Array]:
    """Return encoded prompts with at most _TEXT tokens (B, M, K): those with the largest values, which round worst."""
    found = largest(Conditioning(torch.from_numpy(hidden), torch.from_numpy(pooled)), _TEXT)
    return found.hidden.numpy(), pooled


def _size(model: Runtime) -> tuple[int, int]:
    """Return the pixels of the image that is measured: the folder's own, at most _SIDE tokens on a side."""
    settings = model.settings
    most = _SIDE * settings.factor * settings.patch
    return min(settings.generation.height, most), min(settings.generation.width, most)


def _noise(model: Runtime) -> Array:
    """Return noise for each prompt (PROMPTS, C, h, w)."""
    return initial_latents(model.settings, range(PROMPTS), *_size(model))


def _levels(model: Runtime) -> Array:
    """Return the noise levels of an image in PROMPTS steps (PROMPTS), falling."""
    height, width = _size(model)
    own = model.settings.generation  # whose solver may visit a level twice
    image = replace(own, num_inference_steps=PROMPTS, height=height, width=width, solver=Generation().solver)
    return noise_levels(model.scheduler, model.settings, image)[:-1]


def _velocities(model: Runtime, text: tuple[Array, Array], latents: Array, sigmas: Array) -> Array:
    """Return a velocity for each prompt (PROMPTS, C, h, w), at its level of `sigmas` (PROMPTS)."""
    return model.step(latents, *text, sigmas, model.settings.generation.guidance_scale)
