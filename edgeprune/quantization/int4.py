"""The quantised linear layer and its custom op, which each export translates, and a T5's other layers.

`PackedLinear` keeps integers and group scales. Its forward calls `edgeprune::packed_linear`. A graph exporter sees one
node and replaces it by the target's own form (for ONNX: DequantizeLinear, MatMul, Add). Here the op dequantises and
multiplies, an exact reference; a few rows on an NVIDIA GPU in bf16 go through torch's kernel (int4_kernel.py).

Weights are symmetric: w[o, i] = q[o, i] * scale[o, i // group_size]. With 4 bits q is in -8..7, and each byte holds two
in two's complement, the lower nibble first; with 8 bits q is in -128..127, and each byte holds one (as uint8 bits).
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.common.errors import InputError
from edgeprune.quantization import int4_kernel


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed integers (O, I) into bytes: uint8 (O, I * bits / 8), lower nibble first."""
    if bits == 8:
        return values.to(torch.int8).contiguous().view(torch.uint8)
    unsigned = values.to(torch.int8).view(torch.uint8)
    return ((unsigned[:, 0::2] & 0xF) | (unsigned[:, 1::2] << 4)).contiguous()


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack`: bytes to signed integers, int8 (O, I)."""
    if bits == 8:
        return packed.view(torch.int8)
    signed = packed.view(torch.int8)  # a right shift keeps the sign
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(1)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight matrix (O, I) in `dtype`; `scale` is (O, groups)."""
    values = unpack(packed, bits)
    out, groups = scale.shape
    return values.to(dtype).view(out, groups, -1).mul_(scale.to(dtype)[..., None]).view(out, -1)


def round_int4(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Round a weight (O, I) to symmetric INT4 and return it in its dtype; the gradient passes straight through.

    Rounds as quantize.py does without data: a group's largest weight becomes -8 steps, or 7.5 if it is positive. The
    scale is rounded to half precision.
    """
    groups = weight.detach().float().view(weight.shape[0], -1, group_size)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme > 0, extreme / 7.5, extreme / -8)
    scale = torch.where(extreme == 0, 1.0, scale)
    rounded = (groups / scale).round().clamp(-8, 7) * scale.half().float()
    return weight + (rounded.view_as(weight).to(weight.dtype) - weight.detach())


@torch.library.custom_op("edgeprune::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Multiply x (..., I) by the dequantised weight and add the bias: (..., O) in the dtype of x."""
    if int4_kernel.takes(x, packed, scale, bits):
        out = int4_kernel.linear(x, packed, scale)
        return out if bias is None else out + bias.to(x.dtype)
    weight = dequantize(packed, scale, bits, x.dtype)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@packed_linear.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer with symmetric 4- or 8-bit weights in groups along the input.

    Buffers: `weight_packed` uint8 (O, I * bits / 8), `weight_scale` float16 (O, I / group_size); `bias` (O) or None.

    Raises:
        InputError: `bits` is not 4 or 8, or the group size does not divide the input.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool = True) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise InputError(f"bits: found {bits}, expected 4 or 8")
        if in_features % group_size or (bits == 4 and in_features % 2):
            raise InputError(f"group_size: {group_size} does not divide {in_features} input features")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        self.register_buffer("weight_packed", torch.zeros(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(out_features, in_features // group_size, dtype=torch.float16))
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))
        else:
            self.bias = None

    @property
    def weight(self) -> torch.Tensor:
        """Return the dequantised weight (O, I) in float32, computed at each access; diffusers reads its dtype."""
        return dequantize(self.weight_packed, self.weight_scale, self.bits, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O)."""
        out: torch.Tensor = packed_linear(x, self.weight_packed, self.weight_scale, self.bias, self.bits)
        return out

    def extra_repr(self) -> str:
        """Return the layer's sizes and bits for print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class PackedEmbedding(nn.Module):
    """A table of words whose rows have 8 bits and a scale each. Only the rows that are looked up are dequantised.

    Buffers: `weight_packed` int8 (V, K), `weight_scale` float16 (V, 1).
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight_packed", torch.zeros(words, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(words, 1, dtype=torch.float16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids (B, M) to rows (B, M, K), float32."""
        rows, scales = (nn.functional.embedding(ids, table) for table in (self.weight_packed, self.weight_scale))
        return rows.float() * scales.float()


class HalfLinear(nn.Module):
    """A linear layer without bias whose weight stays in half precision, whatever it computes in.

    Buffer: `weight_half` float16 (I, O), in the order in which exports multiply.
    """

    weight_half: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight_half", torch.zeros(in_features, out_features, dtype=torch.float16))

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight (O, I) in float32; transformers reads its dtype."""
        return self.weight_half.T.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O)."""
        return x @ self.weight_half.to(x.dtype)
