"""The teachers by name: world, splits, networks and lengths of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeprune.artefact.resolve import BUILTIN
from edgeprune.common.splits import Split
from edgeprune.demo.train.flux import Flux
from edgeprune.demo.train.networks import Networks
from edgeprune.demo.train.sd3 import Sd3
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import PLAIN, RICH, SEEN, Grammar, World


@dataclass(frozen=True)
class VaeRecipe:
    """How a world's VAE is trained."""

    steps: int
    rate: float
    """Highest learning rate."""
    scenes: int
    """Rendered scenes."""
    start: Path | None = None
    """Pipeline whose VAE it starts from; None for random weights."""


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained."""

    world: World
    splits: tuple[Split, ...]
    """Those of its training scenes; other splits judge it and what becomes of it."""
    networks: Callable[[Path, Grammar], Networks]
    vae: VaeRecipe
    steps: int
    generation: Generation
    """Sampling settings of the finished model."""
    scenes: int = 40_000
    batch: int = 32
    rate: float = 1e-3
    """Highest learning rate."""


_RICH_VAE = VaeRecipe(steps=1200, rate=1e-3, scenes=4000, start=BUILTIN)
_RICH_TOKENS = 22
_RICH_GENERATION = Generation(num_inference_steps=20, guidance_scale=2.0, height=128, width=128, max_sequence_length=0)

RECIPES = {
    "shapes": Recipe(
        world=PLAIN,
        splits=SEEN,
        networks=partial(Sd3, tokens=16, blocks=14, patch=1),
        vae=VaeRecipe(steps=3000, rate=2e-3, scenes=12_000),
        steps=11_000,
        generation=Generation(num_inference_steps=20, guidance_scale=2.0, height=64, width=64, max_sequence_length=0),
    ),
    "rich-sd3": Recipe(
        world=RICH,
        splits=(Split.TRAINING,),
        networks=partial(Sd3, tokens=_RICH_TOKENS, blocks=17, patch=2),
        vae=_RICH_VAE,
        steps=6000,
        generation=_RICH_GENERATION,
    ),
    "rich-flux": Recipe(
        world=RICH,
        splits=(Split.TRAINING,),
        networks=partial(Flux, tokens=_RICH_TOKENS, joint=4, single=8),
        vae=_RICH_VAE,
        steps=6000,
        generation=Generation(
            num_inference_steps=20, guidance_scale=2.0, height=128, width=128, max_sequence_length=_RICH_TOKENS
        ),
    ),
}
"""The built-in model, then the teachers of the rich world, which share a VAE."""
