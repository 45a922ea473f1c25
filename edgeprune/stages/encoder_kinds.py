"""What the stage `encoders` has to know of the text encoders that it rounds, T5 and Qwens.

Notation: B prompts, M tokens, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from edgeprune.artefact.checks import StoredPart
from edgeprune.artefact.loading import empty_part
from edgeprune.artefact.resolve import read_config
from edgeprune.export.language_model import run_layer, score_bias, speeds_of, turns
from edgeprune.export.modules import T5Encoder, position_bias, run_t5_block
from edgeprune.families.encoders import QWEN2_5_VL, QWEN3, T5, text_encoders
from edgeprune.families.parts import is_read
from edgeprune.quantization.precision import text_precision_of
from edgeprune.quantization.text import WORDS

LAYER = re.compile(r"(?:encoder\.block|model\.layers)\.(\d+)\.")
"""Begins the names of a layer's tensors, with its number."""
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_NORM, _LANGUAGE_NORM = "encoder.final_layer_norm.weight", "model.norm.weight"


class Layers(Protocol):
    """The layers of a text encoder on the meta device, and the prompts that go through them."""

    prefix: ClassVar[str]
    """Of the names of the layers' tensors, before the number."""
    last: ClassVar[str]
    """The last linear layer of a layer: its inputs are products, with a few very large values."""
    words: ClassVar[str]
    """The table of words."""
    outside: ClassVar[tuple[str, ...]]
    """What else is stored that is in no layer."""
    blocks: Sequence[Any]
    """The layers."""
    states: tuple[int, ...]
    """The hidden states that are read; 0 is the embedding."""

    def run(self, block: Any, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Run a layer on the stream (B, M, D) of some prompts, float32."""

    def said(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is read of a hidden state (B, M, D)."""


@dataclass(frozen=True)
class Prompts:
    """What `Layers` are made of: an encoder, and the prompts that go through it."""

    folder: Path
    """The encoder's."""
    original: StoredPart
    """Its tensors."""
    ids: torch.Tensor
    """Of the prompts (B, M)."""
    mask: torch.Tensor
    """(B, M), 1 at tokens and 0 at padding."""
    encoder: RoundedEncoder
    device: torch.device
    """To compute on."""


class T5Layers:
    """The layers of a T5. Padding tokens are read, and the last state is normed."""

    prefix, last = "encoder.block.", "layer.1.DenseReluDense.wo"
    words, outside = WORDS, (_NORM,)

    def __init__(self, given: Prompts) -> None:
        model = empty_part(given.folder, T5).eval().requires_grad_(False)
        self.blocks: Sequence[Any] = model.encoder.block
        self.states: tuple[int, ...] = (len(self.blocks),)
        table = T5Encoder(model).table(given.original[_BIAS].float())
        self._bias = position_bias(table, given.ids).to(given.device)
        self._norm, self._original = model.encoder.final_layer_norm, given.original

    def run(self, block: Any, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """See Layers."""
        return run_t5_block(block, hidden, self._bias)

    def said(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Layers."""
        self._norm.load_state_dict({"weight": self._original[_NORM].float()}, assign=True)
        found: torch.Tensor = self._norm(hidden)
        return found


class Qwen3Layers:
    """The layers of a Qwen3, up to the last state that is read."""

    prefix, last = "model.layers.", "mlp.down_proj"
    words = "model.embed_tokens.weight"
    outside: ClassVar[tuple[str, ...]] = ()

    def __init__(self, given: Prompts) -> None:
        states = given.encoder.states
        model = empty_part(given.folder, given.encoder.kind, states).eval().requires_grad_(False)
        self.blocks: Sequence[Any] = model.model.layers
        self.states = states
        self._angles = turns(speeds_of(model.config).to(given.device), given.ids.shape[1])
        self._bias = score_bias(given.mask.to(given.device))

    def run(self, block: Any, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """See Layers."""
        return run_layer(block, hidden, self._angles, self._bias[rows])

    def said(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Layers."""
        return hidden


class Qwen2VLLayers:
    """The layers of a Qwen2.5-VL, whose last state is normed; of the first tokens nothing is read."""

    prefix, last, words = Qwen3Layers.prefix, Qwen3Layers.last, Qwen3Layers.words
    outside = (_LANGUAGE_NORM,)

    def __init__(self, given: Prompts) -> None:
        self._layers = Qwen3Layers(given)
        self.blocks, self.states = self._layers.blocks, (len(self._layers.blocks),)
        self._unread, self._original = given.encoder.unread, given.original
        self._norm = empty_part(given.folder, given.encoder.kind).model.norm

    def run(self, block: Any, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """See Layers."""
        return self._layers.run(block, hidden, rows)

    def said(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Layers."""
        self._norm.load_state_dict({"weight": self._original[_LANGUAGE_NORM].float()}, assign=True)
        found: torch.Tensor = self._norm(hidden[:, self._unread :])
        return found


KINDS: dict[str, type[T5Layers] | type[Qwen3Layers] | type[Qwen2VLLayers]] = {
    T5: T5Layers, QWEN3: Qwen3Layers, QWEN2_5_VL: Qwen2VLLayers,
}  # fmt: skip
"""The layers of each class that is rounded."""


@dataclass(frozen=True)
class RoundedEncoder:
    """The text encoder of a pipeline that is rounded."""

    name: str
    """Its folder."""
    kind: str
    """Its class."""
    states: tuple[int, ...]
    """Of a language model, the hidden states that are read; none for its last one."""
    unread: int = 0
    """Of its chat, the first tokens that are not read."""


def rounded_encoder(folder: Path) -> RoundedEncoder | None:
    """Return a pipeline's T5 or Qwen; None without one."""
    name, kind = next(((n, k) for n, k in text_encoders(folder).items() if k in KINDS), ("", ""))
    if not name:
        return None
    encoder = next(each for each in read_config(folder)[1].encoders if each.name == name)
    return RoundedEncoder(name, kind, encoder.states, encoder.chat.unread if encoder.chat else 0)


def chunks_of(original: StoredPart, encoder: RoundedEncoder, form: str, group_size: int) -> list[dict[str, int]]:
    """Return the bytes of what is stored, by name: of each layer, then of what is outside layers."""
    read = sorted(name for name in original.names if is_read(encoder.kind, name, encoder.states))
    shapes = {name: original.weights.shapes[original.names[name][0]] for name in read}
    chunks: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        found = LAYER.match(name)
        chunk = chunks.setdefault(int(found[1]) if found else len(shapes), {})
        p, layer = text_precision_of(name, shape, form, group_size=group_size), name.removesuffix(".weight")
        if p.bits == 16:
            chunk[name] = 2 * math.prod(shape)
        else:
            chunk[f"{layer}.weight_packed"] = math.prod(shape) * p.bits // 8
            chunk[f"{layer}.weight_scale"] = 2 * math.prod(shape) // p.group_size
    return [chunks[index] for index in sorted(chunks)]
