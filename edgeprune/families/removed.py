"""Modules that replace a removed block, branch or modulation."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PassThrough(nn.Module):
    """A removed joint block: returns both streams unchanged."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the streams (B, N, D) and (B, M, D) in diffusers' order of results: context first."""
        return encoder_hidden_states, hidden_states


class NoBranch(nn.Module):
    """A removed branch: its output is zero for any gate, so the residual stream does not change."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return a zero (1, 1, 1), which broadcasts with the gate; for joint attention a pair of them."""
        zero = hidden_states.new_zeros(1, 1, 1)
        return zero if self.outputs == 1 else (zero,) * self.outputs


class ConstantModulation(nn.Module):
    """A removed norm's modulation: one vector that no longer depends on timestep and prompt.

    Holds `bias` (6 D, or 2 D): the original linear layer's output at the mean input.
    """

    def __init__(self, linear: nn.Linear, mean: torch.Tensor | None) -> None:
        super().__init__()
        with torch.no_grad():
            bias = linear.bias.clone() if mean is None else linear(mean.to(linear.weight))
        self.bias = nn.Parameter(bias)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Map (B, D) to (1, 6 D), which broadcasts over the batch."""
        return self.bias[None].to(embedding.dtype)


class Zeros(nn.Module):
    """A removed branch whose output is concatenated with another: returns zeros of its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Map (B, N, D) to (B, N, width)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)


class BiasOnly(nn.Module):
    """A linear layer that has lost all of its inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias

    def forward(self) -> torch.Tensor:
        """Return the bias (D)."""
        return self.bias


class SingleBlock(nn.Module):
    """A single-stream block of FLUX.1 without attention, MLP or both, and with only the matching columns of `proj_out`.

    Its modules are those of diffusers' block, under the same names.
    """

    def __init__(self, block: Any, gone: Container[str]) -> None:
        super().__init__()
        self.norm = block.norm
        d, left = block.proj_out.out_features, 0
        if "attn" not in gone:
            self.attn, left = block.attn, d
        if "mlp" not in gone:
            self.proj_mlp, self.act_mlp = block.proj_mlp, block.act_mlp
            left += block.proj_mlp.out_features
        self.proj_out = nn.Linear(left, d) if left else BiasOnly(block.proj_out)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map streams (B, N, D) and (B, M, D) to the same shapes, context first, as diffusers' block does."""
        tokens = encoder_hidden_states.shape[1]
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(joined, emb=temb)
        parts = []
        if hasattr(self, "attn"):
            parts.append(self.attn(normed, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {}))
        if hasattr(self, "proj_mlp"):
            parts.append(self.act_mlp(self.proj_mlp(normed)))
        joined = joined + gate.unsqueeze(1) * self.proj_out(*parts)
        if joined.dtype == torch.float16:
            joined = joined.clip(-65504, 65504)
        return joined[:, :tokens], joined[:, tokens:]


class ProjectedEmbedding(nn.Module):
    """The modulation input as centred coordinates on a basis, for layers that read these coordinates.

    Holds the original `embedder`, `mean` (D) and orthonormal `basis` (R, D). The mean is subtracted first: its
    coordinates are larger than the part that varies, which half precision would round away.
    """

    def __init__(self, embedder: nn.Module, rank: int, width: int) -> None:
        super().__init__()
        self.embedder = embedder
        self.mean = nn.Parameter(torch.zeros(width))
        self.basis = nn.Parameter(torch.zeros(rank, width))

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Map the embedder's inputs to (B, R)."""
        return F.linear(F.silu(self.embedder(*inputs)) - self.mean, self.basis)


class ConstantEmbedding(nn.Module):
    """A removed embedder: all modulation is constant, and its layers read only the dtype of their input."""

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Return one column (B, 1) of the last input: pooled text (B, P), or tokens (B, N, D)."""
        return [each for each in inputs if each is not None][-1].flatten(1)[:, :1]


class Same(nn.Module):
    """A removed single-stream block: returns its stream unchanged."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *_: Any,
        split_hidden_states: bool = False,
        **__: Any,
    ) -> torch.Tensor | tuple[torch.Tensor | None, torch.Tensor]:
        """Return the stream (B, N, D); both streams, context first, of a block of FLUX.2 that is to split them."""
        return (encoder_hidden_states, hidden_states) if split_hidden_states else hidden_states


class LaterColumns(nn.Module):
    """A linear layer that ignores its first inputs, so the branch that produces them contributes nothing."""

    def __init__(self, linear: nn.Linear, first: int) -> None:
        super().__init__()
        self.linear, self.first = linear, first

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, N, first + rest) to (B, N, D)."""
        return F.linear(hidden_states[..., self.first :], self.linear.weight[:, self.first :])


class ParallelAttention(nn.Module):
    """FLUX.2's parallel attention and MLP without one of the two; the projections keep only what the other needs.

    Its modules are those of diffusers' module, under the same names.
    """

    def __init__(self, attention: Any, gone: str) -> None:
        super().__init__()
        d, hidden = attention.inner_dim, attention.mlp_hidden_dim
        self.head_dim, self.attends = attention.head_dim, gone != "attn"
        rows, columns = (3 * d, d) if self.attends else (hidden * attention.mlp_mult_factor, hidden)
        self.to_qkv_mlp_proj = nn.Linear(attention.query_dim, rows, bias=False)
        self.to_out = nn.Linear(columns, attention.out_dim, bias=False)
        if self.attends:
            self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        else:
            self.mlp_act_fn = attention.mlp_act_fn

    def forward(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Map (B, M + N, D) to the same shape."""
        projected = self.to_qkv_mlp_proj(hidden_states)
        if not self.attends:
            mlp: torch.Tensor = self.to_out(self.mlp_act_fn(projected))
            return mlp
        from diffusers.models.embeddings import apply_rotary_emb

        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in projected.chunk(3, dim=-1))
        query, key = self.norm_q(query), self.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.to_out(attended)
        return out
