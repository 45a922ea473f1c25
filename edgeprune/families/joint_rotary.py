"""Joint attention with rotary positions as pairs of real numbers, for Qwen-Image: devices have no complex ones.

Notation: B batch, N image tokens, M text tokens, S of these, H heads, F width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.families.real_rotary import use


class RealJointAttention:
    """Does what diffusers' processor of Qwen-Image does."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the image stream (B, N, D) and the text stream (B, M, D) to the same shapes.

        Args:
            attn: the module.
            hidden_states: the image's.
            encoder_hidden_states: the text's.
            encoder_hidden_states_mask: (B, M), true at text that is seen; None for all.
            attention_mask: none, since image and text are seen by each other.
            image_rotary_emb: cosine and sine (M + N, F) of text and image, or diffusers' complex numbers of image and
                text, (N, F / 2) and (M, F / 2).
        """
        tokens, seen = encoder_hidden_states.shape[1], encoder_hidden_states_mask
        streams = (
            (encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            (hidden_states, (attn.to_q, attn.to_k, attn.to_v)),
        )
        norms = (attn.norm_added_q, attn.norm_added_k, None), (attn.norm_q, attn.norm_k, None)
        parts = [
            [_heads(layer(stream), attn.heads, norm) for layer, norm in zip(layers, each, strict=True)]
            for (stream, layers), each in zip(streams, norms, strict=True)
        ]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        angles = real(image_rotary_emb) if image_rotary_emb[0].is_complex() else image_rotary_emb
        query, key, value = (x.transpose(1, 2) for x in (_turned(query, angles), _turned(key, angles), value))
        mask = None
        if seen is not None:
            # Added to the scores. Core ML converts a boolean mask wrongly. The number is finite in every dtype.
            text = torch.zeros_like(encoder_hidden_states[..., 0]).masked_fill(~seen, torch.finfo(torch.float16).min)
            mask = torch.cat([text, torch.zeros_like(hidden_states[..., 0])], dim=1)[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](out[:, tokens:]), attn.to_add_out(out[:, :tokens])


def _heads(x: torch.Tensor, heads: int, norm: nn.Module | None) -> torch.Tensor:
    """Return (B, S, D) as (B, S, H, F), normed."""
    split = x.unflatten(-1, (heads, -1))
    return split if norm is None else cast("torch.Tensor", norm(split))


def _turned(x: torch.Tensor, angles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Turn neighbouring channels of (B, S, H, F) by cosine and sine (S, F), in float32."""
    cosine, sine = (each[:, None].float() for each in angles)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-odd, even], dim=-1).flatten(3)
    return (x.float() * cosine + across * sine).type_as(x)


def real(frequencies: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine (M + N, F) of diffusers' complex numbers: the image's (N, F / 2), then the text's."""
    image, text = frequencies
    joined = torch.cat([text, image])
    return joined.real.repeat_interleave(2, dim=-1), joined.imag.repeat_interleave(2, dim=-1)


_PROCESSOR = RealJointAttention()


def use_real_numbers(block: Any) -> None:
    """Let a block's attention take pairs of real numbers; of diffusers' complex ones it then computes what it did."""
    use(block, _PROCESSOR)
