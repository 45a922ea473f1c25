"""A T5 text encoder cut between its layers into modules that become Core ML packages; one has weights at a time.

    chunks = split(stored, 400e6)
    convert_network("text_encoder_3", loaded(chunks, stored), ...)

T5-XXL has 4.9 GB of weights in 8 bits, and coremltools holds several copies of what it converts. The first chunk has
the table of words, the last the final norm. From chunk to chunk goes the residual stream, in float32: T5-XXL's exceeds
half precision. Position biases are no such value: from the table by distance (257 x 64 numbers) that every chunk has,
each computes its own, which is 500 times as large.

Notation: B batch, M text tokens, K text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.export import modules
from edgeprune.export.stored_t5 import StoredT5

_STREAM = "text_stream_"
"""Beginning of the names of what one chunk passes to the next; not one of coreml_chunks.STREAMS, which are half."""
_WORDS = "encoder.embed_tokens.weight"


class T5Chunk(nn.Module):
    """Consecutive layers of a T5; its tensors have the names of StoredT5.read.

    The first chunk takes `input_ids` (B, M), the last returns `last_hidden_state` (B, M, K).

    Args:
        whole: the T5.
        layers: indices of the chunk's layers.
        index: the chunk's number, from 0.
    """

    bias: torch.Tensor

    def __init__(self, whole: modules.T5Encoder, layers: Sequence[int], index: int) -> None:
        super().__init__()
        encoder = whole.model.encoder
        parts: dict[str, nn.Module] = {"block": nn.ModuleDict({str(i): encoder.block[i] for i in layers})}
        self.inputs: Sequence[str] = [f"{_STREAM}{index}"]
        self.outputs: Sequence[str] = [f"{_STREAM}{index + 1}"]
        if layers[0] == 0:
            parts["embed_tokens"] = encoder.embed_tokens
            self.inputs = list(whole.inputs)
        if layers[-1] == len(encoder.block) - 1:
            parts["final_layer_norm"] = encoder.final_layer_norm
            self.outputs = list(whole.outputs)
        self.encoder = nn.ModuleDict(parts)
        self.register_buffer("bias", whole.bias)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        """Map ids (B, M) or the stream (B, M, K) to the stream or the last hidden state (B, M, K), float32."""
        encoder: Any = self.encoder
        bias = modules.position_bias(self.bias, tokens)
        hidden = encoder["embed_tokens"](tokens).float() if "embed_tokens" in encoder else tokens
        for block in encoder["block"].values():
            hidden = modules.run_t5_block(block, hidden, bias)
        return (encoder["final_layer_norm"](hidden) if "final_layer_norm" in encoder else hidden,)


def split(stored: StoredT5, most: float) -> list[T5Chunk]:
    """Cut a T5 into chunks of at most `most` bytes of weights, or of one layer; they are on the meta device."""
    whole = stored.empty()
    encoder = whole.model.encoder
    table = encoder.embed_tokens.state_dict().values()
    held, layers = sum(t.numel() * (1 if t.dtype == torch.int8 else 2) for t in table), [list[int]()]
    for index, block in enumerate(encoder.block):
        size = sum(tensor.nbytes for tensor in block.state_dict().values())
        if layers[-1] and held + size > most:
            layers.append([])
            held = 0
        layers[-1].append(index)
        held += size
    return [T5Chunk(whole, chosen, index) for index, chosen in enumerate(layers)]


def loaded(chunks: Sequence[T5Chunk], stored: StoredT5) -> Iterator[T5Chunk]:
    """Yield each chunk with its weights; they are dropped before the next chunk is loaded."""
    for chunk in chunks:
        # A table of floats stays in half precision, in which it is stored.
        kinds = {name: torch.float16 if name == _WORDS else torch.float32 for name in chunk.state_dict()}
        chunk.load_state_dict({name: stored.read(name, kind) for name, kind in kinds.items()}, assign=True)
        yield chunk.requires_grad_(False)
        chunk.to("meta")
