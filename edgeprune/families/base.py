"""What a family of MMDiTs must say about itself, and how the right one is found.

A family is the only place that knows an architecture. Its facts about names and shapes come from the config
alone and need no torch, so that runtimes can ask for them; what touches modules imports torch when called. Families
are found by the config's `_class_name`; a new one is one new file, listed in `_MODULES`.

Everywhere outside of a family a model is the same: latents (B, C, h, w), a noise level sigma in 0..1, encoded text
(hidden (B, M, K) and pooled (B, P)), and a velocity (B, C, h, w). What the model itself wants is the family's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

Config = dict[str, Any]
"""A transformer's config.json."""

Shape = tuple[int, ...]

Array = Any
"""A numpy array or a torch tensor: what is done with it, both can."""

Axes = Mapping[str, Mapping[int, str]]
"""Dynamic axes by tensor name: {"hidden_states": {0: "batch_size", 2: "height"}}."""

_MODULES = {
    "SD3Transformer2DModel": "edgeprune.families.sd3",
    "FluxTransformer2DModel": "edgeprune.families.flux",
    "Flux2Transformer2DModel": "edgeprune.families.flux2",
}

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
    columns: tuple[tuple[int, int], ...] | None = None
    """The same for columns."""
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


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a pipeline."""

    name: str
    """Its folder."""
    kind: str
    """Its class in transformers."""
    optional: bool = False
    """Whether pipelines come without it."""


@dataclass(frozen=True)
class LatentSpace:
    """What a transformer denoises."""

    channels: int
    """C."""
    patch: int
    """Latent pixels of a token's side."""
    largest: int | None = None
    """Most tokens on a side, where a position table ends; None for no limit."""


class Family(Protocol):
    """One MMDiT architecture. B batch, N image tokens, M text tokens, D width, C latent channels."""

    name: str
    pipeline: str
    """The class of diffusers that it is used by."""
    components: tuple[str, ...]
    norms: tuple[str, ...]
    """The components that are adaLN modulations: what stays of a removed one is its mean."""
    embedder: str
    """Name of the module whose output, after silu, is the modulation input."""
    encoders: tuple[Encoder, ...]
    tail: tuple[str, ...]
    """What the names of tensors after the last block begin with."""
    position_inputs: tuple[str, ...]
    """Inputs of the network that depend on sizes alone; `positions` reads them."""

    # ---------------------------------------------------------------- from the config alone, without torch

    def block_count(self, config: Config) -> int:
        """How many blocks the transformer has."""

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Shape of every tensor of the state dict, buffers included."""

    def is_buffer(self, name: str) -> bool:
        """True if this tensor of the state dict is no parameter (a fixed table)."""

    def table(self, config: Config, name: str) -> torch.Tensor:
        """A fixed table's values, float32."""

    def in_block(self, name: str) -> bool:
        """True if this tensor belongs to a block."""

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Block index and component of a tensor; component None for the rest of a block; None outside blocks."""

    def modulates(self, name: str) -> bool:
        """True if this tensor is of a layer that reads the modulation input: weight (O, D) or bias (O)."""

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Components that the architecture does not have, so that removing them changes nothing."""

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """The config of the model that has only the blocks `kept` (original indices)."""

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """For every tensor of the shorter model, which original tensor it is made from."""

    def latents(self, config: Config) -> LatentSpace:
        """What is denoised."""

    def text_widths(self, config: Config) -> tuple[int, int]:
        """K and P."""

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """M, of tokenizers that pad to `prompt_tokens` (the first) and `max_sequence_length` (T5)."""

    def defaults(self, config: Config) -> dict[str, Any]:
        """The fields of `Generation` whose defaults are not those of SD3."""

    def guided(self, config: Config, scale: float) -> bool:
        """True if guidance of this scale takes a second, unconditional evaluation in every step."""

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Noise levels before each step, not yet shifted; None for the scheduler's own."""

    def shift(self, tokens: int, steps: int) -> float | None:
        """Dynamic shift (mu) of an image of so many tokens, where a pipeline has a rule of its own."""

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Dynamic axes of what the network takes, in order, and of what it gives."""

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """What the network takes, by name: latents (B, C, h, w), text (B, M, K), pooled (B, P), sigma (B), packed.

        Of numpy arrays or of torch tensors; positions, which no data changes, are numpy in both cases.
        """

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """The network's output as velocity (B, C, h, w), which is `shape`."""

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Hidden (B, M, K) and pooled (B, P) text from the outputs of exported text encoders, by encoder."""

    # ---------------------------------------------------------------- modules

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """The shorter model's structure on the meta device, ready for a strict state dict."""

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """The swaps that make a branch (or, for None, the block) contribute nothing.

        `mean` is the mean modulation input (D), which a removed norm is fixed at.
        """

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """What the modulation layers multiply: (B, D). `timestep` is 1000 sigma."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The model's blocks, in order."""

    def attention(self, block: nn.Module) -> nn.Module | None:
        """A block's attention, where it still has one: one stream, or image and context."""

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """What the names of a block's tensors begin with in the state dict: `transformer_blocks.3.`."""

    def scaling_groups(self, block: nn.Module) -> list[ScalingGroup]:
        """Layers of a block whose common input can be divided channel by channel at no cost; see awq.py."""

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden (B, M, K) and pooled (B, P) text by the pipeline's own encoders."""

    # ---------------------------------------------------------------- the forward pass in pieces, for exports

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let a model hold fixed tables in less room, in place; the tensors that it then has for those of `read`."""

    def positions(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What every block reads that depends on sizes alone; none where the embedding has it."""

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image stream (B, N, D), text stream (B, M, D) and modulation input (B, D) before the first block."""

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One block: both streams after it; the text stream is None where the block ends it."""

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """h, w in tokens, where `unembed` needs them."""

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """The network's output from the image stream after the last block."""


WHERE = "transformer/config.json"
_MOST_WEIGHTS = 10**12


def whole(config: Config, field: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
    """A field of a transformer's config; `default` where it is missing or null.

    Raises:
        InputError: it is not a whole number from `least` to `most`.
    """
    if default is not None and config.get(field) is None:
        return default
    return fields.whole(config, field, WHERE, least=least, most=most)


def bounded(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """The shapes themselves.

    Raises:
        InputError: they are of more weights than any model has.
    """
    count = sum(map(math.prod, shapes.values()))
    if count > _MOST_WEIGHTS:
        raise InputError(f"{WHERE}: found a model of {count:.1e} weights, expected up to {_MOST_WEIGHTS:.0e}")
    return shapes


def family_of(config: Config, where: str = "transformer/config.json") -> Family:
    """The family of a config.

    Raises:
        InputError: the class is not an MMDiT that we know.
    """
    name = config.get("_class_name")
    stock = name.removeprefix(CHANGED) if isinstance(name, str) else ""
    if stock not in _MODULES:
        raise InputError(f"{where}: _class_name: found {shown(name)}, expected an MMDiT: {', '.join(_MODULES)}")
    family: Family = importlib.import_module(_MODULES[stock]).FAMILY
    return family


def family_of_model(model: nn.Module) -> Family:
    """The family of a loaded transformer. FSDP makes a class of its own from a model's.

    Raises:
        InputError: its class is not an MMDiT that we know.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    known = next((name for name in names if name.removeprefix(CHANGED) in _MODULES), names[0])
    return family_of({"_class_name": known}, names[0])
