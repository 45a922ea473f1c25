"""Attention with rotary positions as pairs of real numbers, for Z-Image: devices have no complex ones.

Notation: B batch, S tokens, N image tokens, M text tokens, H heads, F pairs of channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn import functional as F

from edgeprune.families.padding import MULTIPLE


class RealAttention:
    """Does what diffusers' processor of Z-Image does."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None,
        attention_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
    ) -> torch.Tensor:
        """Map a stream (B, S, D) to the same shape.

        Args:
            attn: the module.
            hidden_states: the stream.
            encoder_hidden_states: none, since there is one stream.
            attention_mask: (B, S) or (B, 1, 1, S), true at tokens that are seen; None for all.
            freqs_cis: cosine and sine (B, S, F, 2), or diffusers' complex numbers (B, S, F).
        """
        layers = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        pairs = (torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis).unsqueeze(2)
        query, key = (_turned(x, pairs) for x in (query, key))
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return cast("torch.Tensor", attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _turned(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of (B, S, H, 2 F) by pairs (B, S, 1, F, 2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(3).type_as(x)


_PROCESSOR = RealAttention()


def use(block: Any, processor: Any) -> None:
    """Let a block's attention compute by a processor, in place; an estimator may have wrapped the block."""
    for part in block.modules():
        if hasattr(part, "processor"):  # a removed branch has none
            part.processor = processor


def through(
    block: Any, x: torch.Tensor, mask: torch.Tensor | None, pairs: torch.Tensor, vector: torch.Tensor | None
) -> torch.Tensor:
    """Run a block on a stream (B, S, D); see `RealAttention` for mask and pairs, `vector` is the modulation input.

    The block keeps that processor: of diffusers' complex numbers it computes the same.
    """
    use(block, _PROCESSOR)
    return cast("torch.Tensor", block(x, attn_mask=mask, freqs_cis=pairs, adaln_input=vector))


def angles(places: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """Return cosine and sine (S, size / 2, 2) of places (S) on an axis, float32.

    Args:
        places: whole numbers.
        size: channels of a head that turn by this axis.
        theta: the fastest pair turns by 1 from place to place, the slowest by nearly 1 / theta.
        dtype: to multiply in.
    """
    speeds = torch.tensor([1.0 / theta ** (i / size) for i in range(0, size, 2)], dtype=dtype, device=places.device)
    turned = (places.to(dtype)[:, None] * speeds).float()
    return torch.stack([turned.cos(), turned.sin()], dim=-1)


def seen(image: int, tokens: int, units: torch.Tensor) -> torch.Tensor:
    """Return which tokens of a stream are seen (B, 1, 1, N + M): all of the image, and of the text its padded length.

    Args:
        image: N; 0 for a stream of text alone.
        tokens: M.
        units: length of each row's text in multiples of 32 (B), rounded up.
    """
    # As whole numbers: bf16 has none of the odd ones above 256.
    return (torch.arange(-image, tokens, device=units.device) < units.long()[:, None] * MULTIPLE)[:, None, None]


def turns(positions: Sequence[torch.Tensor], tokens: int, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what image (B, N, F, 2) and text (B, M, F, 2) turn by.

    Text stands at places from 1 on of the first axis, the image at the place after the text's padding, and the image's
    padding at 0 of every axis, which does not turn.

    Args:
        positions: cosine and sine of the first axis by place, those of the others by image token, and 1 at image tokens
            that are no padding (N).
        tokens: M.
        units: length of each row's text in multiples of 32 (B), rounded up.
    """
    (places, grid, real), batch = positions, units.shape[0]
    after = places[units.long() * MULTIPLE + 1]
    first = torch.where(real[None, :, None, None] > 0, after[:, None], places[0])
    image = torch.cat([first, grid[None].expand(batch, -1, -1, -1)], dim=2)
    still = places[:1, :1].expand(tokens, grid.shape[1], -1)
    text = torch.cat([places[1 : tokens + 1], still], dim=1)[None].expand(batch, -1, -1, -1)
    return image, text
