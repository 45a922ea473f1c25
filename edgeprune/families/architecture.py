"""What a family says about its model from the config alone: names, shapes, blocks and defaults. Torch-free.

Planning, byte counts and the runtimes need nothing else, so a new family can start with this role.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeprune.families.encoders import Chat

Config = dict[str, Any]
"""A transformer's config.json."""

Shape = tuple[int, ...]

STREAMS = ("image", "text")
"""The streams of a block that keeps them apart."""
STAND_IN = "stand_in"
"""Name of the module, below a block, of the maps that stand in for the removed blocks before it."""

WHERE = "transformer/config.json"
"""The file that error messages about a config name."""
_MOST_WEIGHTS = 10**12


@dataclass(frozen=True)
class Source:
    """How one tensor of the shorter model is made."""

    name: str
    """Tensor of the original model."""
    rows: tuple[tuple[int, int], ...] | None = None
    """Row ranges to keep, in this order; None keeps all rows."""
    columns: tuple[tuple[int, int], ...] | None = None
    """Column ranges to keep, in this order; None keeps all columns."""
    constant: bool = False
    """The bias of a modulation layer that is removed or projected: the modulation at the mean input."""
    projected: bool = False
    """The weight of a modulation layer that reads its input's coordinates on a basis."""
    calibrated: bool = False
    """Calibration makes this tensor, not the original model; `name` is then `mean` or `basis`."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a pipeline."""

    name: str
    """Its folder."""
    kind: str
    """Its class in transformers."""
    optional: bool = False
    """Whether a pipeline may lack it."""
    states: tuple[int, ...] = ()
    """The hidden states that are read, if not all layers are needed for what is read; 0 is the embedding."""
    chat: Chat | None = None
    """The chat in which a language model gets a prompt."""
    after: int = 0
    """Layers after the last state that is read, where the pipeline counts states from the end; 0 for any number."""
    padding: bool = True
    """Whether hidden states of padding are read; they are 0 if not."""

    def length(self, max_sequence_length: int) -> int:
        """Return to how many tokens a prompt is padded or cut, if not to those of its tokenizer."""
        return max_sequence_length + (self.chat.unread if self.chat else 0)


@dataclass(frozen=True)
class LatentSpace:
    """The space of the latents that a transformer denoises."""

    channels: int
    """C."""
    patch: int
    """Side of a token in latent pixels."""
    largest: int | None = None
    """Most tokens along one side, if a position table limits them; None for no limit."""
    multiple: int = 1
    """All tokens of an image are padded to a multiple of this number."""


@dataclass(frozen=True)
class Hints:
    """What a pipeline's folder tells about sampling besides the transformer's config."""

    distilled: bool = False
    """`is_distilled` in model_index.json: the model samples in few steps, unguided."""
    names: str = ""
    """The names that the folder has and gives: of the model and of those that it was made from, in lower case."""
    shifts_by_size: bool = False
    """Whether the scheduler shifts noise levels by the image's size, as FLUX.1 dev's does and schnell's does not."""

    @property
    def dedistilled(self) -> bool:
        """Whether a name says that a distilled model was trained to take guidance again."""
        return re.search(r"(de|un)[-_ ]?distill|open[-_ ]?flux|libre[-_ ]?flux", self.names) is not None

    @property
    def few_steps(self) -> int | None:
        """The steps of a model whose name says that it takes few: `8steps`, or 0 if the name gives no number."""
        if match := re.search(r"(?<!\d)(\d\d?)[-_ ]?steps?(?![a-z])", self.names):
            return int(match[1])
        return 0 if re.search(r"turbo|lightning|hyper[-_ ]?(sd|flux)|schnell", self.names) else None


class Architecture(Protocol):
    """What one MMDiT architecture looks like. M text tokens, D width."""

    name: str
    """Short name of the family, as plans store it."""
    pipeline: str
    """Class name of its pipeline in diffusers."""
    components: tuple[str, ...]
    """Parts of a block that pruning can remove."""
    norms: tuple[str, ...]
    """The components that are adaLN modulations. A removed one keeps its mean."""
    vae: str
    """Class name of its VAE in diffusers."""
    overflows: bool
    """Whether values of published weights are known to exceed half precision."""
    embedder: str
    """Name of the module whose output, after silu, is the modulation input."""
    encoders: tuple[Encoder, ...]
    """Text encoders of the pipeline, in order."""
    tail: tuple[str, ...]
    """Name prefixes of the tensors after the last block."""
    streams: Mapping[str, tuple[str, ...]]
    """The streams that a block of each kind reads, in the order of its arguments; `joined` where both are one."""

    def block_count(self, config: Config) -> int:
        """Return the number of transformer blocks."""

    def width(self, config: Config) -> int:
        """Return D, the width of the streams."""

    def kinds(self, config: Config) -> dict[str, range]:
        """Return the indices of the blocks of each kind: `joint` has two streams, `single` one."""

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Return the shape of every tensor of the state dict, buffers included."""

    def is_buffer(self, name: str) -> bool:
        """Return True if this tensor is a fixed table and not a parameter."""

    def in_block(self, name: str) -> bool:
        """Return True if this tensor belongs to a block."""

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Return block index and component of a tensor.

        The component is None for tensors of a block that no component owns; the result is None outside blocks.
        """

    def modulates(self, name: str) -> bool:
        """Return True for weight (O, D) and bias (O) of a layer that reads the modulation input."""

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Return the components that blocks lack or nothing reads: removing them changes no output."""

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Return the config of the model that has only the blocks `kept` (original indices)."""

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Return, for every tensor of the shorter model, the original tensor that it is made from."""

    def latents(self, config: Config) -> LatentSpace:
        """Return the space of the latents."""

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return K and P, the widths of hidden and pooled text."""

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Return M. The first tokenizer pads to `prompt_tokens`, T5's to `max_sequence_length`."""

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Guess the fields of `Generation` that differ from SD3's, for a folder that does not say them.

        Args:
            config: the transformer's.
            hints: what the folder says.
        """

    def takes_guidance(self, config: Config) -> bool:
        """Return True if the guidance scale is an input of the model, which then needs no second evaluation."""

    def guided(self, config: Config, scale: float) -> bool:
        """Return True if this guidance scale needs a second, unconditional evaluation per step."""

    def guide(self, without: Any, with_text: Any, scale: float) -> Any:
        """Return the guided velocity (B, C, h, w) of those without and with the prompt, numpy arrays or tensors."""

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Return the guidance scale that acts in place of this one, and in a line why; '' if there is nothing to say.

        Args:
            config: the transformer's.
            scale: as the user gave it.
            distilled: as in `Hints`.
        """

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Return the noise level before each step, unshifted; None to use the scheduler's."""

    def shift(self, tokens: int, steps: int) -> float | None:
        """Return the dynamic shift (mu) for an image of `tokens` tokens; None to use the scheduler's rule."""


def extrapolated(without: Any, with_text: Any, scale: float) -> Any:
    """Return the answer of `Architecture.guide` for a model that is guided as Ho and Salimans do."""
    return without + scale * (with_text - without)


def guided_above_one(scale: float) -> tuple[float, str]:
    """Return the answer of `Architecture.heeded` for a model that is guided by a second evaluation."""
    if 0 < scale < 1:
        return scale, f"guidance scale {scale:g} has no effect: 1 or less is no guidance"
    return scale, ""


def config_number(
    config: Config, field: str, default: int | None = None, *, least: int = 1, most: int = LARGEST
) -> int:
    """Return an integer field of a transformer's config, or `default` if it is missing or null.

    Raises:
        InputError: the field is not a whole number from `least` to `most`.
    """
    if default is not None and config.get(field) is None:
        return default
    return fields.whole_number(config, field, WHERE, least=least, most=most)


def bounded(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Return the shapes unchanged, after checking that a real model can have so many weights.

    Raises:
        InputError: the shapes hold too many weights.
    """
    count = sum(map(math.prod, shapes.values()))
    if count > _MOST_WEIGHTS:
        raise InputError(f"{WHERE}: found a model of {count:.1e} weights, expected up to {_MOST_WEIGHTS:.0e}")
    return shapes
