"""What pruning does to a family's modules: build the shorter model, and take blocks and branches out of a running one.

Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgeprune.families.architecture import Config

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Swap:
    """An attribute of a module, and the module that replaces it while a branch is removed."""

    owner: nn.Module
    attribute: str
    replacement: nn.Module


class Surgery(Protocol):
    """What pruning and quantisation do to the modules of one architecture. D width."""

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build the shorter model on the meta device, ready for a strict state dict."""

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Compute a fixed table in float32, rounded to `dtype`."""

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps that make a component (None: the whole block) contribute nothing.

        `mean` (D) is the mean modulation input: a removed norm becomes its modulation at this input.
        """

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the model's blocks, in order."""

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return a block's attention, or None if it was removed. It returns one stream, or image and context."""

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """Return the name prefix of a block's tensors in the state dict, such as `transformer_blocks.3.`."""
