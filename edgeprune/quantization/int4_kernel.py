"""torch's INT4 kernel for NVIDIA GPUs, which multiplies a few rows without unpacking the weights to memory first.

Its weights are w = (u - 8) * scale + zero with u in 0..15 and a scale and a zero per group of inputs. Ours are the same
numbers with u = q + 8 and zero = 0, so nothing is rounded but scales to bf16, as where weights are unpacked in bf16. It
unpacks every weight once for each 16 rows: modulation layers, a third of SD3.5 Large, have one row per image; with the
thousands of rows of an image's tokens, unpacking once is faster. Weights are rearranged at each call, which costs less
than unpacking and keeps no second copy of them.
"""

from __future__ import annotations

import torch

ROWS = 16
"""Most rows that are multiplied so."""
GROUP_SIZES = (32, 64, 128, 256)
_TILES = 8
"""Tiles of 16 inputs that the kernel reads at a time."""


def takes(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int) -> bool:
    """Return whether the kernel is there and multiplies x (..., I) by weights that are packed as `int4.pack` does."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype != torch.bfloat16 or bits != 4:
        return False
    outputs, inputs = packed.shape[0], x.shape[-1]
    fits = outputs % 8 == 0 and inputs % (16 * _TILES) == 0 and inputs // scale.shape[1] in GROUP_SIZES
    return fits and x.numel() <= ROWS * inputs and torch.cuda.get_device_capability(x.device) >= (8, 0)


def linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply x (..., I) by the weights (O, I): (..., O).

    Args:
        x: bfloat16.
        packed: uint8 (O, I / 2), the lower nibble first.
        scale: (O, groups).
    """
    inputs = x.shape[-1]
    unsigned = ((packed << 4) | (packed >> 4)) ^ 0x88  # the upper nibble first, and 8 more
    weights = torch._convert_weight_to_int4pack(unsigned, _TILES)
    steps = scale.to(x.dtype).T
    steps_and_zeros = torch.stack([steps, torch.zeros_like(steps)], dim=-1).contiguous()
    rows = x.reshape(-1, inputs).contiguous()
    out = torch._weight_int4pack_mm(rows, weights, inputs // scale.shape[1], steps_and_zeros)
    return out.view(*x.shape[:-1], packed.shape[0])
