"""The subspace of the modulation layers' input: its mean, its principal directions, and how many of these matter.

All adaLN layers of a model read the same vector, which depends only on timestep and pooled prompt. Collected over
calibration (timesteps x prompts), these vectors lie close to a subspace, which is found here; surgery.py makes the
layers read coordinates in it. Directions are ranked by variance alone, not by what the layers do with them.

Notation: S samples, D width, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family

GRID = 20
"""Number of noise levels from 0 to 1 used for calibration, in addition to the sampler's: distillation uses other levels
than the sampler, and users may."""
TOLERANCE = 0.15
"""The residual that `auto` accepts: the share of the root mean square deviation from the mean that may be lost. On the
built-in model this gives an eighth of the velocity error of removing the least contributing block, and a seventh of the
error of INT4 (docs/modulation.md)."""


@dataclass(frozen=True)
class Subspace:
    """Mean and principal directions of a set of modulation inputs."""

    mean: torch.Tensor
    """Shape (D)."""
    directions: torch.Tensor
    """Shape (min(S - 1, D), D), orthonormal, largest variance first."""

    def basis(self, rank: int) -> torch.Tensor:
        """Return the leading directions (R, D).

        Raises:
            InputError: calibration had too few samples for this rank.
        """
        if rank > len(self.directions):
            raise InputError(
                f"--modulation-rank: found {rank}, expected up to {len(self.directions)}: calibration had no more "
                "samples; give more --prompts"
            )
        return self.directions[:rank]

    def residuals(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the residual of inputs (S, D) for each number of directions, starting with 0.

        The residual is a share of the inputs' root mean square deviation from the mean.
        """
        deviations = (inputs - self.mean).double()
        total = deviations.square().sum()
        kept = (deviations @ self.directions.double().T).square().sum(0).cumsum(0)
        lost = torch.cat([total[None], total - kept]) / total.clamp_min(1e-30)
        return lost.clamp_min(0).sqrt()


def subspace(inputs: torch.Tensor) -> Subspace:
    """Return mean and principal directions of modulation inputs (S, D)."""
    mean = inputs.double().mean(0)
    deviations = inputs.double() - mean
    _, vectors = torch.linalg.eigh(deviations.T @ deviations)
    directions = vectors.T.flip(0)[: max(1, min(len(inputs) - 1, len(mean)))]
    # The sign of an eigenvector is arbitrary. Fix it, so that results are easier to compare between machines.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Subspace(mean.float(), (directions * largest.sign()).float())


def ranks(width: int) -> list[int]:
    """Return the ranks that `auto` chooses from, ascending, up to half the width.

    Layers with fewer than 16 inputs get 8 bits instead of 4, so rank 8 would take as many bytes as 16. Ranks from 16 on
    are one INT4 group or a multiple of 64, because some devices accept no other groups.
    """
    return [r for r in (2, 4, 16, 32, *range(64, width + 1, 64)) if r <= width // 2]


def choose_rank(inputs: torch.Tensor, width: int) -> int | None:
    """Return the smallest rank whose residual is within TOLERANCE on held-out prompts, or None if there is none.

    Directions always fit the prompts that they were found on. So they are found on every other prompt and tested on the
    prompts in between.

    Args:
        inputs: modulation inputs (prompts, timesteps, D).
        width: D.
    """
    residuals = subspace(inputs[::2].flatten(0, 1)).residuals(inputs[1::2].flatten(0, 1))
    return next((r for r in ranks(width) if r < len(residuals) and residuals[r] <= TOLERANCE), None)


def embedder_alone(family: Family, config: Config, read: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """Return a transformer reduced to its embedder, in float32, which is all that `modulation_inputs` needs.

    Args:
        read: returns a tensor of the transformer by name.
    """
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
    """Return the modulation inputs (B, T, D) of every pooled prompt (B, P) at every timestep (T).

    Args:
        model: a transformer, or one that `embedder_alone` returns.
        guidance: the guidance scale, for models that take it as an input.
    """
    by_timestep = [
        family.modulation_input(model, t.expand(len(pooled)), pooled, guidance) for t in timesteps.to(pooled)
    ]
    return torch.stack(by_timestep, dim=1)
