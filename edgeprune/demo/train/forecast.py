"""How long a training takes on this machine, from a few steps of each of its stages."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from edgeprune.demo.train.matching import train_transformer
from edgeprune.demo.train.recipes import Recipe
from edgeprune.demo.train.scenes import make_latents
from edgeprune.demo.train.vae import train_vae

_SCENES, _STEPS = 40, 4


def forecast(recipe: Recipe) -> str:
    """Return a line with the minutes of each stage, uncompiled, if none is done yet; takes seconds."""
    world, splits = recipe.world, recipe.splits
    few = replace(recipe.vae, scenes=_SCENES)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        world.training_scenes(1, 0, splits)  # sorts the captions into splits, once
        start = time.monotonic()
        vae = train_vae(folder, world, splits, steps=2, seed=0, count=few.scenes, rate=few.rate, start=few.start)
        trained = time.monotonic()
        latents, captions = make_latents(folder, vae, world, splits, count=_SCENES, seed=0)
        drawn = time.monotonic()
        networks = recipe.networks(folder, world.grammar)

        def steps(count: int) -> float:
            train_transformer(
                folder, networks, latents, captions, steps=count, seed=0, batch=recipe.batch, peak=recipe.rate
            )
            return time.monotonic()

        first = steps(1)
        step = (steps(1 + _STEPS) - first) / _STEPS
    parts = {
        f"VAE, {recipe.vae.steps} steps": recipe.vae.steps * (trained - start) / 2,
        f"{recipe.scenes} scenes": recipe.scenes * (drawn - trained) / _SCENES,
        f"transformer, {recipe.steps} steps": recipe.steps * step,
    }
    text = "; ".join(f"{part} {seconds / 60:.0f} min" for part, seconds in parts.items())
    threads = torch.get_num_threads()
    return f"forecast with {threads} thread{'s' * (threads > 1)}: {text}; {sum(parts.values()) / 3600:.1f} h in all"
