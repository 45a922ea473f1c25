"""The noise levels of a model: those that its sampler visits, and the shift that both sampler and training apply.

A scheduler shifts levels towards noise. All of its ways to do so are one function of one number s:
sigma' = s sigma / (1 + (s - 1) sigma). A constant shift gives s itself; a dynamic one, by image size, gives mu, and s
is exp(mu) or, with a linear time shift, mu.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from edgeprune.families import Architecture, Config, family_of_model
from edgeprune.sampling.scheduler import FlowMatch

Levels = TypeVar("Levels", float, torch.Tensor)


@dataclass(frozen=True)
class NoiseSchedule:
    """A scheduler, and the model and number of steps that it is used with."""

    scheduler: FlowMatch
    family: Architecture
    config: Config
    """The transformer's."""
    steps: int

    @classmethod
    def of(cls, pipe: Any, steps: int) -> NoiseSchedule:
        """Return the schedule of a pipeline for a number of steps."""
        return cls(FlowMatch.of(pipe.scheduler), family_of_model(pipe.transformer), pipe.transformer.config, steps)

    @classmethod
    def load(cls, folder: Path, family: Architecture, config: Config, steps: int) -> NoiseSchedule:
        """Read the scheduler of a pipeline's folder; nothing else is loaded."""
        return cls(FlowMatch.load(folder), family, config, steps)

    def shift(self, shape: tuple[int, ...]) -> float:
        """Return the number s by which levels are shifted, for latents of `shape` (C, h, w)."""
        tokens = self._tokens(shape)
        return self.scheduler.shifted_by(tokens, self.family.shift(tokens, self.steps))

    def sigmas(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the noise levels of each step for latents of `shape` (C, h, w), then 0: (steps + 1), falling."""
        tokens, steps = self._tokens(shape), self.steps
        levels, mu = self.family.levels(steps), self.family.shift(tokens, steps)
        return torch.from_numpy(self.scheduler.sigmas(steps, tokens=tokens, levels=levels, mu=mu))

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return shape[-1] * shape[-2] // self.family.latents(self.config).patch ** 2


def shifted(levels: Levels, shift: float) -> Levels:
    """Shift noise levels in 0..1 towards noise by the number s of `NoiseSchedule.shift`."""
    return shift * levels / (1 + (shift - 1) * levels)
