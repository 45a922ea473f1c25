"""Draws the same image with a diffusers-like client and with a runtime: one prompt, one seed, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune import runtimes
from edgeprune.runtimes.base import initial_latents, read_settings

PROMPT, SEED, STEPS = "two red circles", 3, 4


def drawn(pipe: Any, folder: Path) -> NDArray[np.int64]:
    """Draw with any client, from the noise that the runtimes start with."""
    settings = read_settings(folder)
    made = settings.generation
    return np.asarray(
        pipe(
            PROMPT,
            latents=torch.from_numpy(initial_latents(settings, [SEED], made.height, made.width)),
            num_inference_steps=STEPS,
            guidance_scale=made.guidance_scale,
            max_sequence_length=made.max_sequence_length,
            height=made.height,
            width=made.width,
        ).images[0],
        int,
    )


def ours(folder: Path, runtime: str) -> NDArray[np.int64]:
    """Draw the same image with a runtime."""
    with runtimes.load(folder, runtime) as model:
        return np.asarray(model.generate(PROMPT, seed=SEED, steps=STEPS)[0], int)
