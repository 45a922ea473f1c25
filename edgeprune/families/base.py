"""What a family of MMDiTs must say about itself, and how the right one is found.

A family is the only place that knows an architecture. Its facts about names and shapes come from the config
alone and need no torch; what touches modules imports torch when called. Families are found by the config's
`_class_name`; a new one is one new file, listed in `_MODULES`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

Config = dict[str, Any]
"""A transformer's config.json."""

Shape = tuple[int, ...]

_MODULES = {"SD3Transformer2DModel": "edgeprune.families.sd3"}

CHANGED = "Edgeprune"
"""What stands before diffusers' class name where a model is no longer of that class: parts of blocks are gone."""


@dataclass(frozen=True)
class Swap:
    """A module's attribute and what takes its place while a branch is removed."""

    owner: nn.Module
    attribute: str
    replacement: nn.Module


@dataclass(frozen=True)
class Source:
    """Where a tensor of the shorter model comes from."""

    name: str
    """Tensor of the original model."""
    rows: tuple[tuple[int, int], ...] | None = None
    """Row ranges to keep, in this order; None keeps all."""
    constant: bool = False
    """True for the bias of a modulation layer that is removed or projected: the modulation at the mean input."""
    projected: bool = False
    """True for the weight of a modulation layer that reads its input's coordinates on a basis instead."""
    calibrated: bool = False
    """True for what calibration makes instead of a tensor of the original: `name` is `mean` or `basis`."""


@dataclass(frozen=True)
class Producer:
    """Rows of a linear layer that can absorb a division of its outputs."""

    layer: str
    """Name within the block."""
    rows: tuple[int, int]
    """From, to."""
    one_plus: bool = False
    """True if the outputs are used as 1 + them."""


@dataclass(frozen=True)
class ScalingGroup:
    """Layers of a block that read one input, and what makes it."""

    consumers: tuple[str, ...]
    producers: tuple[Producer, ...]


class Family(Protocol):
    """One MMDiT architecture. B batch, N image tokens, M text tokens, D width, C latent channels."""

    name: str
    components: tuple[str, ...]
    embedder: str
    """Name of the module whose output, after silu, is the modulation input."""

    def block_count(self, config: Config) -> int:
        """How many blocks the transformer has."""

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Shape of every tensor of the state dict, buffers included."""

    def is_buffer(self, name: str) -> bool:
        """True if this tensor of the state dict is no parameter (a fixed table)."""

    def place(self, name: str) -> tuple[int, str | None] | None:
        """Block index and component of a tensor; component None for the rest of a block; None outside blocks."""

    def modulates(self, name: str) -> bool:
        """True if this tensor is of a layer that reads the modulation input: weight (O, D) or bias (O)."""

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Components that the architecture does not have, so that removing them changes nothing."""

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """The config of the model that has only the blocks `kept` (original indices)."""

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """For every tensor of the shorter model, which original tensor it is made from."""

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """The shorter model's structure on the meta device, ready for a strict state dict."""

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """The swaps that make a branch (or, for None, the block) contribute nothing.

        `mean` is the mean modulation input (D), which a removed norm is fixed at.
        """

    def modulation_input(self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """What the modulation layers multiply: (B, D)."""

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The model's own list of blocks, in order."""

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """What the names of a block's tensors begin with in the state dict: `transformer_blocks.3.`."""

    def scaling_groups(self, block: nn.Module) -> list[ScalingGroup]:
        """Layers of a block whose common input can be divided channel by channel at no cost; see awq.py."""


def family_of(config: Config, where: str = "transformer/config.json") -> Family:
    """The family of a config.

    Raises:
        InputError: the class is not an MMDiT that we know.
    """
    name = config.get("_class_name")
    stock = name.removeprefix(CHANGED) if isinstance(name, str) else ""
    if stock not in _MODULES:
        raise InputError(f"{where}: _class_name: found {name!r}, expected an MMDiT: {', '.join(_MODULES)}")
    family: Family = importlib.import_module(_MODULES[stock]).FAMILY
    return family
