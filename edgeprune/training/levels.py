"""At which noise levels a student is trained: pure functions of a generator.

`shifted` draws logit-normal levels and shifts them as the scheduler does (Stable Diffusion 3, arXiv 2403.03206, and
HierarchicalPrune's code). `steps` draws a share exactly at the levels that the model is sampled at, which for a
few-step model are the only ones that it was made for, and the rest shifted. `uniform` draws from 0..1, unshifted.
"""

from __future__ import annotations

import torch

from edgeprune.sampling.schedule import shifted

LEVELS = ("shifted", "steps", "uniform")
FEW_STEPS = 8
"""A model that is sampled in at most so many steps is trained with `steps` by default."""
SHARE_ON_STEPS = 0.5
"""The share of samples that `steps` draws at the levels of the sampler."""


def default_levels(steps: int) -> str:
    """Return how levels are drawn by default for a model that is sampled in this many steps."""
    return "steps" if steps <= FEW_STEPS else "shifted"


def draw_levels(kind: str, size: int, shift: float, sampled: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels (size) in 0..1.

    Args:
        kind: one of LEVELS.
        size: the number of samples.
        shift: the scheduler's, see NoiseSchedule.
        sampled: the levels of the sampler (T), without 0.
        generator: the source of randomness.
    """
    if kind == "uniform":
        return torch.rand(size, generator=generator)
    levels = shifted(torch.sigmoid(torch.randn(size, generator=generator)), shift)
    if kind == "steps":
        on_steps = torch.rand(size, generator=generator) < SHARE_ON_STEPS
        picked = sampled[torch.randint(len(sampled), (size,), generator=generator)]
        levels = torch.where(on_steps, picked, levels)
    return levels
