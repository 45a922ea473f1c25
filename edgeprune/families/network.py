"""A family's network: its inputs and output, its text, and its forward pass in pieces, as exports need it.

Outside a family every model has the same interface: latents (B, C, h, w), a noise level sigma in 0..1, encoded text
(hidden (B, M, K) and pooled (B, P)) and a velocity (B, C, h, w). The family translates these to what the network reads.
Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.families.architecture import Config, Shape

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

Array = Any
"""A numpy array or a torch tensor; families use only operations that both have."""

Axes = Mapping[str, Mapping[int, str]]
"""Dynamic axes by tensor name: {"hidden_states": {0: "batch_size", 2: "height"}}."""


class Network(Protocol):
    """How to run one architecture. B batch, N image tokens, M text tokens, D width, C latent channels."""

    position_inputs: tuple[str, ...]
    """Inputs of the network that depend on sizes alone; `positions` reads them."""
    conditioning_inputs: tuple[str, ...]
    """Inputs of the network that `conditioning` reads."""

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Return the dynamic axes of the network's inputs, in order, and of its output."""

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Return the network's inputs by name: latents (B, C, h, w), text (B, M, K), pooled (B, P), sigma (B), packed.

        Accepts numpy arrays or torch tensors. Position inputs, which depend on no data, are always numpy.
        """

    def call(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output of diffusers' own forward pass, as `unembed` does; `model` may be wrapped for training."""

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Return the network's output as a velocity of `shape` (B, C, h, w)."""

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return hidden (B, M, K) and pooled (B, P) text from the outputs of exported text encoders, by encoder."""

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden (B, M, K) and pooled (B, P) text from the pipeline's own encoders."""

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return the vector that the modulation layers multiply: (B, D). `timestep` is 1000 sigma."""

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store a model's fixed tables more compactly, in place; return the tensors that replace those of `read`."""

    def positions(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return what every block reads that depends on sizes alone; empty if the embedding adds positions.

        Args:
            model: the transformer.
            inputs: its inputs by name.
            exact: as the model itself computes it, to the bit, which devices may lack the number format for.
        """

    def embed_tokens(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image stream (B, N, D) and text stream (B, M, D) before the first block."""

    def conditioning(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what `run` and `unembed` take as modulation: the modulation input (B, D) before its activation."""

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams before the first block, and the conditioning."""

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one block and return both streams; the text stream is None if it ends in this block.

        Rows of zeros in the text stream may be padding, and are then returned as such.
        """

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Return height and width in tokens; empty if `unembed` does not need them."""

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return the network's output from the image stream after the last block."""
