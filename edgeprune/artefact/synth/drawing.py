"""Random weights whose activations have the size of trained ones and stay finite in half precision."""

from __future__ import annotations

import math
import re
import zlib

import torch

from edgeprune.families import Shape

AT_ONCE = 2**22
"""Numbers drawn at once, in float32: a multiple of 16, because torch draws normal numbers in groups of 16."""
_LOOKED_UP = re.compile(r".*(shared|embed_tokens|token_embedding|position_embedding|relative_attention_bias)\.weight")
_T5_QUERY = re.compile(r".*\.SelfAttention\.q\.weight")
_T5_HEAD = 64
"""Width of a head in every published T5."""


def draw(name: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a random tensor, the same for the same name and shape.

    The standard deviations of a weight's rows are log-normal around 1 / sqrt(inputs) with a spread of a third, as in
    trained weights; around 1 in a table whose rows are looked up. T5 does not divide the products of queries and keys
    by the root of the head's width, so its queries are smaller by that factor.

    Args:
        name: of the tensor in its network.
        shape: its shape.
        dtype: that of the result.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if len(shape) == 1:
        values = torch.randn(shape, generator=generator) * 0.05
        return (values + float(name.endswith((".weight", ".running_var")))).to(dtype)
    if name.endswith(".gamma"):  # a norm's, with an axis for each of the image
        return (1 + torch.randn(shape, generator=generator) * 0.05).to(dtype)
    rows, inputs = shape[0], math.prod(shape[1:])
    size = 1.0 if _LOOKED_UP.fullmatch(name) else inputs**-0.5
    if _T5_QUERY.fullmatch(name):
        size *= _T5_HEAD**-0.5
    spread = torch.exp(torch.randn(rows, generator=generator) / 3) * size
    out = torch.empty(rows, inputs, dtype=dtype)
    step = 16 * max(1, AT_ONCE // (16 * inputs))
    for part, scale in zip(out.split(step), spread.split(step), strict=True):
        part.copy_(torch.randn(part.shape, generator=generator).mul_(scale[:, None]))
    return out.view(shape)
