"""Modules that become Core ML packages: a transformer cut into chunks, and a text encoder reduced to what is read.

    split(Transformer(model), 4, example) -> [Chunk, ...]

Each module has `inputs` and `outputs`, the names of what its `forward` takes and returns. Running the chunks one after
the other, with outputs passed on by name, computes the whole transformer.

Notation: B batch, N image tokens, M text tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.export import modules
from edgeprune.residency.stored import StoredTransformer

MODULATION = "modulation"
STREAMS = ("image_tokens_", "text_tokens_", MODULATION)
"""Beginnings of the names of what one chunk passes to another; these tensors stay in half precision."""

Tensors = Mapping[str, torch.Tensor]


class Chunk(nn.Module):
    """Consecutive blocks of a transformer; the first chunk has what comes before the blocks too, the last the output.

    `inputs` of the first chunk and `outputs` of the last are those of modules.Transformer, without positions, which are
    constants for one image size. Between chunks go the streams of image tokens (B, N, D) and text tokens (B, M, D), and
    from the first chunk to all others the modulation input (B, D).

    Args:
        whole: the transformer.
        blocks: indices of the chunk's blocks.
        index: the chunk's number, from 0.
        example: inputs of the whole transformer; they give the image size.
    """

    def __init__(self, whole: modules.Transformer, blocks: Sequence[int], index: int, example: Tensors) -> None:
        super().__init__()
        model, self.family = whole.model, whole.family
        self.config, self.grid = model.config, self.family.grid(model, example)
        self.blocks = list(blocks)
        self.first, self.last = blocks[0] == 0, blocks[-1] == len(self.family.blocks(model)) - 1
        # Weights have the same names in the package as in the checkpoint.
        self.places = [self.family.block_prefix(model, i).rstrip(".").rpartition(".") for i in blocks]
        every = range(len(self.family.blocks(model)))
        lists = {self.family.block_prefix(model, i).rstrip(".").rpartition(".")[0] for i in every}
        for name, child in model.named_children():
            if name in lists:
                kept = {key: child[int(key)] for list_name, _, key in self.places if list_name == name}
                setattr(self, name, nn.ModuleDict(kept))
            elif self.last if f"{name}.".startswith(self.family.tail) else self.first:
                setattr(self, name, child)
        for i, table in enumerate(self.family.positions(model, example)):
            self.register_buffer(f"positions_{i}", table, persistent=False)
        self.constants = {name: example[name] for name in self.family.position_inputs if self.first}
        """What the embedding reads of positions."""
        self.take(model)
        # In one program no output may have the name of an input.
        self.inputs: Sequence[str] = [f"image_tokens_{index}", f"text_tokens_{index}", MODULATION]
        self.outputs: Sequence[str] = [f"image_tokens_{index + 1}", f"text_tokens_{index + 1}"]
        if self.first:
            self.inputs = [name for name in whole.inputs if name not in self.family.position_inputs]
            self.outputs = [*self.outputs, MODULATION]
        if self.last:
            self.outputs = list(whole.outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map the tensors named by `inputs` to those named by `outputs`."""
        text: torch.Tensor | None
        if self.first:
            given = dict(zip(self.inputs, tensors, strict=True))
            image, text, modulation = self.family.embed(self, given | self.constants)
        else:
            image, text, modulation = tensors
        positions = [buffer for name, buffer in self.named_buffers() if name.startswith("positions_")]
        for list_name, _, key in self.places:
            assert text is not None
            image, text = self.family.run(getattr(self, list_name)[key], image, text, modulation, positions)
        if self.last:
            return (self.family.unembed(self, image, modulation, self.grid),)
        assert text is not None
        return (image, text, modulation) if self.first else (image, text)

    def take(self, model: nn.Module) -> None:
        """Refer to the tensors that the transformer has outside its modules, if this is the first chunk."""
        for name, tensor in model.named_parameters(recurse=False):
            if self.first:
                self.register_parameter(name, tensor)

    def tensors(self, stored: StoredTransformer) -> list[str]:
        """Return the checkpoint's names of this chunk's tensors."""
        blocks = [name for i in self.blocks for name in stored.names(i)]
        outside = [(name, name.startswith(self.family.tail)) for name in stored.names(None)]
        return blocks + [name for name, tail in outside if (self.last if tail else self.first)]


def split(whole: modules.Transformer, chunks: int, example: Tensors) -> list[Chunk]:
    """Cut a transformer into `chunks` chunks of nearly equal numbers of blocks, for the image size of `example`.

    There are fewer chunks if the transformer has fewer blocks.
    """
    count = len(whole.family.blocks(whole.model))
    blocks = np.array_split(np.arange(count), min(chunks, count))
    return [Chunk(whole, chunk.tolist(), i, example) for i, chunk in enumerate(blocks)]


def loaded(chunks: Sequence[Chunk], stored: StoredTransformer) -> Iterator[Chunk]:
    """Yield each chunk with its weights; they are dropped before the next chunk is loaded."""
    for chunk in chunks:
        stored.fill(chunk.tensors(stored))
        chunk.take(stored.model)
        yield chunk
        chunk.to("meta")


class TrimmedTextEncoder(nn.Module):
    """A modules.TextEncoder with only the outputs that a pipeline reads: pooled text and the last two states."""

    inputs = tuple(modules.TextEncoder.inputs)

    def __init__(self, encoder: modules.TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        # Core ML allows no dot in a name.
        self.outputs = [name.replace(".", "_") for name in self._trim(list(self.encoder.outputs))]
        self.example = self.encoder.example

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode ids (B, M) to pooled text (B, P) and two states (B, M, D)."""
        return tuple(self._trim(self.encoder(input_ids)))

    @staticmethod
    def _trim(outputs: Sequence[Any]) -> list[Any]:
        return [outputs[0], *outputs[-2:]]
