"""Where the input of the modulation layers lives: its mean, its principal directions, and how many of these matter.

The input of every adaLN layer of a model is one vector, made from timestep and pooled prompt alone. Collected over
calibration (timesteps x prompts) it is near a subspace, found here; surgery.py makes the layers read coordinates in it.
What it leaves out: weighing directions by what the layers do with them.

Notation: S samples, D width, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family

GRID = 20
"""Noise levels from 0 to 1 that are calibrated on beside the sampler's own: distillation uses others, users may."""
TOLERANCE = 0.15
"""What `auto` may leave of the deviations from the mean, as a share of their root mean square. On the built-in model it
gives an eighth of the velocity error of removing the least block, and a seventh of that of INT4 (docs/modulation.md).
"""


@dataclass(frozen=True)
class Subspace:
    """Mean and principal directions of a set of modulation inputs."""

    mean: torch.Tensor
    """(D)."""
    directions: torch.Tensor
    """(min(S - 1, D), D), orthonormal, the one of the largest variance first."""

    def basis(self, rank: int) -> torch.Tensor:
        """The leading directions (R, D).

        Raises:
            InputError: calibration had too few samples.
        """
        if rank > len(self.directions):
            raise InputError(
                f"--modulation-rank: found {rank}, expected up to {len(self.directions)}: calibration had no more "
                "samples; give more --prompts"
            )
        return self.directions[:rank]

    def residuals(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each number of directions, from 0 on, leaves of inputs (S, D): a share of their root mean square
        deviation from the mean.
        """
        deviations = (inputs - self.mean).double()
        total = deviations.square().sum()
        kept = (deviations @ self.directions.double().T).square().sum(0).cumsum(0)
        left = torch.cat([total[None], total - kept]) / total.clamp_min(1e-30)
        return left.clamp_min(0).sqrt()


def subspace(inputs: torch.Tensor) -> Subspace:
    """Mean and principal directions of modulation inputs (S, D)."""
    mean = inputs.double().mean(0)
    deviations = inputs.double() - mean
    _, vectors = torch.linalg.eigh(deviations.T @ deviations)
    directions = vectors.T.flip(0)[: max(1, min(len(inputs) - 1, len(mean)))]
    # An eigenvector's sign is arbitrary; the same on every machine is easier to compare.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Subspace(mean.float(), (directions * largest.sign()).float())


def ranks(width: int) -> list[int]:
    """Ranks that `auto` chooses from, rising, up to half the width.

    Below 16 thin layers have 8 bits instead of 4, so 8 is as large as 16. From 16 on they are one group of INT4, or
    groups of 64: some devices take no other.
    """
    return [r for r in (2, 4, 16, 32, *range(64, width + 1, 64)) if r <= width // 2]


def choose_rank(inputs: torch.Tensor, width: int) -> int | None:
    """The smallest rank whose directions, found on every other prompt, leave `TOLERANCE` of the prompts between them.

    Held out, because directions always fit the prompts that they were found on.

    Args:
        inputs: (prompts, timesteps, D).

    Returns:
        None where no rank up to half the width does.
    """
    left = subspace(inputs[::2].flatten(0, 1)).residuals(inputs[1::2].flatten(0, 1))
    return next((r for r in ranks(width) if r < len(left) and left[r] <= TOLERANCE), None)


def embedder_alone(family: Family, config: Config, read: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """A transformer of which only the embedder is left, in float32: all that modulation inputs take."""
    model = family.build(config, list(range(family.block_count(config))), frozenset())
    for name, _ in list(model.named_children()):
        if name != family.embedder:
            delattr(model, name)
    model.load_state_dict({name: read(name).float() for name in model.state_dict()}, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def modulation_inputs(
    family: Family, model: torch.nn.Module, timesteps: torch.Tensor, pooled: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Modulation inputs (B, T, D) of every pooled prompt (B, P) at every timestep (T).

    Args:
        model: a transformer, or what `embedder_alone` leaves of it.
        guidance: the scale, for models that take it as an input.
    """
    parts = [family.modulation_input(model, t.expand(len(pooled)), pooled, guidance) for t in timesteps.to(pooled)]
    return torch.stack(parts, dim=1)
