"""What stands in the place of a removed block, branch or modulation. Shared by the families."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PassThrough(nn.Module):
    """A removed joint block: both streams go by unchanged."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Streams (B, N, D) and (B, M, D) in diffusers' order of results: context first."""
        return encoder_hidden_states, hidden_states


class NoBranch(nn.Module):
    """A removed branch: its output is zero, whatever the gate, so its residual stream stays as it is."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A zero of shape (1, 1, 1), broadcast by the gate's product; a pair of them for joint attention."""
        zero = hidden_states.new_zeros(1, 1, 1)
        return zero if self.outputs == 1 else (zero,) * self.outputs


class ConstantModulation(nn.Module):
    """A removed norm's modulation: one vector, no longer a function of timestep and prompt.

    Holds `bias` (6 D, or 2 D): the output of the original linear layer at the mean input.
    """

    def __init__(self, linear: nn.Linear, mean: torch.Tensor | None) -> None:
        super().__init__()
        with torch.no_grad():
            bias = linear.bias.clone() if mean is None else linear(mean.to(linear.weight))
        self.bias = nn.Parameter(bias)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, D) to (1, 6 D): broadcast over the batch."""
        return self.bias[None].to(embedding.dtype)


class Zeros(nn.Module):
    """A removed branch whose output is concatenated with another: zeros of its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(B, N, D) to (B, N, width)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)


class BiasOnly(nn.Module):
    """A linear layer all of whose inputs are gone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, 0) to (1, 1, D): broadcast."""
        return self.bias[None, None].to(hidden_states.dtype)


class ProjectedEmbedding(nn.Module):
    """The modulation input as its coordinates on a basis, centred, where layers read these instead.

    Holds the original `embedder`, `mean` (D) and orthonormal `basis` (R, D). The mean is taken off first: its own
    coordinates are larger than what varies, and half precision would round that away.
    """

    def __init__(self, embedder: nn.Module, rank: int, width: int) -> None:
        super().__init__()
        self.embedder = embedder
        self.mean = nn.Parameter(torch.zeros(width))
        self.basis = nn.Parameter(torch.zeros(rank, width))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Whatever the embedder takes, to (B, R)."""
        return F.linear(F.silu(self.embedder(*inputs)) - self.mean, self.basis)


class ConstantEmbedding(nn.Module):
    """A removed embedder: all modulation is constant, and its layers ask their input for nothing but its dtype."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One column (B, 1) of the pooled text (B, P), which comes last."""
        return inputs[-1][:, :1]
