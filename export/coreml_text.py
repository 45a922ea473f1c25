"""A T5 or Qwen3 text encoder cut between its layers into modules that become Core ML packages; one has weights at once.

    chunks = split(stored, 400e6)
    convert_network("text_encoder_3", loaded(chunks, stored), ...)

T5-XXL has 4.9 GB of weights in 8 bits, and coremltools holds several copies of what it converts. The first chunk has
the table of words, the last the final norm, if there is one. From chunk to chunk goes the residual stream, in float32:
T5-XXL's exceeds half precision. Each chunk returns the hidden states that are read among its layers. What layers know
of positions is no such value: each chunk computes it from a table. T5's position biases are 500 times as large as that
table by distance (257 x 64 numbers).

Notation: B batch, M text tokens, K text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.export.modules import LayeredEncoder
from edgeprune.export.stored_encoder import StoredEncoder

_STREAM = "text_stream_"
"""Beginning of the names of what one chunk passes to the next; not one of coreml_chunks.STREAMS, which are half."""
_WORDS = "embed_tokens"


class TextChunk(nn.Module):
    """Consecutive layers of a text encoder; its tensors have the names of StoredEncoder.read.

    The first chunk takes `input_ids` (B, M), the others the stream (B, M, K); all take the encoder's other inputs. A
    chunk returns the hidden states (B, M, K) that are read after its layers, and the stream; the last one no stream.

    Args:
        whole: the text encoder.
        layers: indices of the chunk's layers.
        index: the chunk's number, from 0.
    """

    def __init__(self, whole: LayeredEncoder, layers: Sequence[int], index: int) -> None:
        super().__init__()
        inner, every = whole.inner, whole.layers
        last = layers[-1] == len(every) - 1
        self.place, _, self.stack = whole.stack.partition(".")
        parts: dict[str, nn.Module] = {self.stack: nn.ModuleDict({str(i): every[i] for i in layers})}
        if layers[0] == 0:
            parts[_WORDS] = inner.embed_tokens
        if last and whole.norm:
            parts[whole.norm] = getattr(inner, whole.norm)
        self.add_module(self.place, nn.ModuleDict(parts))
        self.register_buffer(whole.shared, getattr(whole, whole.shared))
        self.shared, self.norm, self.around, self.run = whole.shared, whole.norm, whole.around, whole.run
        self.as_read = whole.as_read
        self.returned = {str(i): name for i, name in whole.returned.items() if i in layers}
        ids, *others = whole.inputs
        self.inputs: Sequence[str] = [f"{_STREAM}{index}" if layers[0] else ids, *others]
        # Core ML allows no dot in a name.
        names = [name.replace(".", "_") for name in self.returned.values()]
        self.outputs: Sequence[str] = names if last else [*names, f"{_STREAM}{index + 1}"]
        self.last = last

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map the tensors named by `inputs` to those named by `outputs`, float32 all."""
        tokens, *others = tensors
        inner: Any = getattr(self, self.place)
        around = self.around(getattr(self, self.shared), tokens, *others)
        hidden = inner[_WORDS](tokens).float() if _WORDS in inner else tokens
        found = []
        for key, layer in inner[self.stack].items():
            hidden = self.run(layer, hidden, *around)
            if key in self.returned:
                found.append(self.as_read(inner[self.norm](hidden) if self.norm else hidden, *others))
        return tuple(found if self.last else [*found, hidden])


def split(stored: StoredEncoder[Any], most: float) -> list[TextChunk]:
    """Cut a text encoder into chunks of at most `most` bytes of weights, or of one layer; they are on the meta device.

    No chunk ends with a layer after which a state is returned, except the last: coremltools has one name for a value,
    and this one would be the stream, too. Such a chunk has one layer more.
    """
    whole: LayeredEncoder = stored.empty()
    table = whole.inner.embed_tokens.state_dict().values()
    held, layers = sum(t.numel() * (1 if t.dtype == torch.int8 else 2) for t in table), [list[int]()]
    for index, layer in enumerate(whole.layers):
        size = sum(tensor.nbytes for tensor in layer.state_dict().values())
        if layers[-1] and held + size > most and index - 1 not in whole.returned:
            layers.append([])
            held = 0
        layers[-1].append(index)
        held += size
    return [TextChunk(whole, chosen, index) for index, chosen in enumerate(layers)]


def loaded(chunks: Sequence[TextChunk], stored: StoredEncoder[Any]) -> Iterator[TextChunk]:
    """Yield each chunk with its weights; they are dropped before the next chunk is loaded."""
    for chunk in chunks:
        # A table of floats stays in half precision, in which it is stored.
        words = f"{chunk.place}.{_WORDS}.weight"
        kinds = {name: torch.float16 if name == words else torch.float32 for name in chunk.state_dict()}
        chunk.load_state_dict({name: stored.read(name, kind) for name, kind in kinds.items()}, assign=True)
        yield chunk.requires_grad_(False)
        chunk.to("meta")
