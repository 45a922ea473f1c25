"""How every tensor is stored: in 4, 8 or 16 bits. Torch-free, so a plan can count bytes without weights.

- Linear weights inside blocks: 4 bits, symmetric, in groups of 64, or of 32 or 16 if only those divide the input;
  8 bits if none does. They are nearly all of the bytes.
- Linear weights outside blocks (timestep and prompt embedders, context embedder, output): 8 bits with one scale
  per output. They are few, and they matter to every token at every step.
- All other tensors (biases, norm scales, the patch convolution, the position table): 16 bits.

A T5 text encoder has rules of its own, the forms, even if the transformer is not quantised: T5-XXL has 4.76 G
parameters, 19 GB in float32. All of its linear weights are inside blocks. A Qwen3 has the same rules; its `wo` is
`down_proj`.

| form | linear weights | words | T5-XXL |
| --- | --- | --- | --- |
| `int4` | 4 bits, as in the transformer's blocks | 8 bits, one scale per word | 2.6 GB |
| `int4-wo8` | the same, but the last of each layer, `wo`, in 8 bits with one scale per output | the same | 3.1 GB |
| `int8` | 8 bits with one scale per output | 16 bits | 4.9 GB |
| `half` | 16 bits | 16 bits | 9.5 GB |

Position biases and norms have 16 bits. Other encoders and the VAE keep the precision in which the format computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeprune.families import Architecture, Shape

GROUP_SIZES = (64, 32, 16)
TEXT_INT4, TEXT_INT4_WO8, TEXT_INT8, TEXT_HALF = "int4", "int4-wo8", "int8", "half"
TEXT_FORMS = (TEXT_INT4, TEXT_INT4_WO8, TEXT_INT8, TEXT_HALF)
"""The forms in which a T5 or Qwen3 can be exported."""
ENCODERS = (TEXT_INT4, TEXT_INT8, TEXT_HALF)
"""What `--encoders` takes; of INT4 it is measured whether `wo` has 8 bits."""


@dataclass(frozen=True)
class Precision:
    """How one tensor is stored. `group_size` weights share a 16-bit scale; 0 means no scale."""

    bits: int
    group_size: int = 0

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of a tensor of this shape, scales included."""
        count = math.prod(shape)
        return count * self.bits // 8 + (count // self.group_size * 2 if self.group_size else 0)


def precision_of(family: Architecture, name: str, shape: Shape, *, group_size: int = 64) -> Precision:
    """Apply the rule to one tensor of a transformer's state dict."""
    if not name.endswith(".weight") or len(shape) != 2:
        return Precision(16)
    return _in_groups(shape, group_size) if family.in_block(name) else Precision(8, shape[1])


def text_precision_of(name: str, shape: Shape, form: str = TEXT_INT8, *, group_size: int = 64) -> Precision:
    """Apply the rule of a form to one tensor of a T5EncoderModel's or a Qwen3's state dict."""
    if form == TEXT_HALF or len(shape) != 2 or "relative_attention_bias" in name:
        return Precision(16)
    if not is_text_linear(name, shape):  # the table of words
        return Precision(16) if form == TEXT_INT8 else Precision(8, shape[1])
    if form == TEXT_INT8 or (form == TEXT_INT4_WO8 and name.endswith((".wo.weight", ".mlp.down_proj.weight"))):
        return Precision(8, shape[1])
    return _in_groups(shape, group_size)


def is_text_linear(name: str, shape: Shape) -> bool:
    """Return whether a tensor of a T5EncoderModel's or a Qwen3's state dict is the weight of a linear layer."""
    in_block = ".block." in name or name.startswith("model.layers.")
    return in_block and len(shape) == 2 and "relative_attention_bias" not in name


def _in_groups(shape: Shape, group_size: int) -> Precision:
    """Return 4 bits in groups of this size, or of a smaller one if only that divides the input; 8 bits if none does."""
    for size in (group_size, *GROUP_SIZES):
        if size <= group_size and shape[1] % size == 0:
            return Precision(4, size)
    return Precision(8, shape[1])


@dataclass(frozen=True)
class Footprint:
    """Number and bytes of a transformer's weights."""

    parameters: int
    bf16_bytes: int
    int4_bytes: int

    def __add__(self, other: Footprint) -> Footprint:
        """Add two footprints."""
        return Footprint(
            parameters=self.parameters + other.parameters,
            bf16_bytes=self.bf16_bytes + other.bf16_bytes,
            int4_bytes=self.int4_bytes + other.int4_bytes,
        )


def footprint(family: Architecture, shapes: dict[str, Shape], *, group_size: int = 64) -> Footprint:
    """Count a set of tensors. The bytes include fixed tables; `parameters` does not."""
    return Footprint(
        parameters=sum(math.prod(s) for n, s in shapes.items() if not family.is_buffer(n)),
        bf16_bytes=sum(2 * math.prod(s) for s in shapes.values()),
        int4_bytes=sum(precision_of(family, n, s, group_size=group_size).nbytes(s) for n, s in shapes.items()),
    )
