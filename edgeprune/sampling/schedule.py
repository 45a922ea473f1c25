"""The noise levels of a model: those that its sampler visits, and the shift that both sampler and training apply.

A scheduler shifts levels towards noise. All of its ways to do so are one function of one number s:
sigma' = s sigma / (1 + (s - 1) sigma). A constant shift gives s itself; a dynamic one, by image size, gives mu, and s
is exp(mu) or, with a linear time shift, mu.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from edgeprune.families import Architecture, Config, family_of_model

Levels = TypeVar("Levels", float, torch.Tensor)


@dataclass(frozen=True)
class NoiseSchedule:
    """A scheduler of diffusers, and the model and number of steps that it is used with."""

    scheduler: Any
    family: Architecture
    config: Config
    """The transformer's."""
    steps: int

    @classmethod
    def of(cls, pipe: Any, steps: int) -> NoiseSchedule:
        """Return the schedule of a pipeline for a number of steps."""
        return cls(pipe.scheduler, family_of_model(pipe.transformer), pipe.transformer.config, steps)

    @classmethod
    def load(cls, folder: Path, family: Architecture, config: Config, steps: int) -> NoiseSchedule:
        """Read the scheduler of a pipeline's folder; nothing else is loaded."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        return cls(scheduler, family, config, steps)

    def shift(self, shape: tuple[int, ...]) -> float:
        """Return the number s by which levels are shifted, for latents of `shape` (C, h, w)."""
        mu, config = self._mu(shape), self.scheduler.config
        if mu is None:
            return float(config.shift)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def sigmas(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the noise levels of each step for latents of `shape` (C, h, w), then 0: (steps + 1), falling."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        mu = self._mu(shape)
        dynamic = {} if mu is None else {"mu": mu}
        scheduler.set_timesteps(self.steps, sigmas=self.family.levels(self.steps), **dynamic)
        levels: torch.Tensor = scheduler.sigmas.float()
        return levels

    def _mu(self, shape: tuple[int, ...]) -> float | None:
        """Return the dynamic shift of an image of this size; None if the shift is constant."""
        c = self.scheduler.config
        if not c.get("use_dynamic_shifting"):
            return None
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        tokens = shape[-1] * shape[-2] // self.family.latents(self.config).patch ** 2
        limits = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        mu = self.family.shift(tokens, self.steps)
        return float(calculate_shift(tokens, *limits)) if mu is None else mu


def shifted(levels: Levels, shift: float) -> Levels:
    """Shift noise levels in 0..1 towards noise by the number s of `NoiseSchedule.shift`."""
    return shift * levels / (1 + (shift - 1) * levels)
