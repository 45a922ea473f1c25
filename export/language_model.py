"""The language models that encode text, as they are exported: Qwen3 and Qwen2.5-VL, up to the last state read.

They compute what transformers returns for `output_hidden_states`: causal attention that leaves out padding, grouped
queries, norms of queries and keys or biases, rotary positions; no cache and no head. The last norm is there if the last
state is read, which transformers norms. Of Qwen2.5-VL, which sees images, too, this is what it says of text alone.
The residual stream stays float32 even if everything else is half precision, as a T5's does.

Notation: B batch, M tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from edgeprune.export.modules import LayeredEncoder
from edgeprune.families import Axes

_SEQUENCE = {0: "batch_size", 1: "sequence_length"}
_LAST = "last_hidden_state"
SPEEDS = "speeds"
"""Name of the buffer with the speeds of the rotary positions, which no file has."""


class LanguageModel(LayeredEncoder):
    """Hidden states of a causal language model, each by its name.

    `reference` is transformers' own forward pass; exports are compared with it.

    Args:
        model: a language model with the layers up to the last state that is read, see `cut_unread`.
        states: the hidden states that are returned, 0 is the embedding; none for the last one, normed.
        padding: whether those of padding are returned; else they are 0.
    """

    inputs: Axes = {"input_ids": _SEQUENCE, "attention_mask": _SEQUENCE}
    stack, shared = "model.layers", SPEEDS
    speeds: torch.Tensor

    def __init__(self, model: Any, states: Sequence[int], *, padding: bool = True) -> None:
        super().__init__(model)
        self.states, self.padding = tuple(states), padding
        self.norm = "" if self.states else "norm"
        names = [f"hidden_states.{state}" for state in self.states] or [_LAST]
        self.outputs: Axes = dict.fromkeys(names, _SEQUENCE)
        self.register_buffer(SPEEDS, speeds_of(self.config))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ids and a mask of 1 at tokens and 0 at padding, (B, M) int64 each, to the states (B, M, D)."""
        around = self.around(self.speeds, input_ids, attention_mask)
        hidden = self.inner.embed_tokens(input_ids).float()
        found = {0: hidden}
        for index, layer in enumerate(self.layers):
            hidden = self.run(layer, hidden, *around)
            found[index + 1] = hidden
        read = [found[state] for state in self.states] or [getattr(self.inner, self.norm)(hidden)]
        return tuple(self.as_read(state, attention_mask) for state in read)

    def as_read(self, state: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return a hidden state (B, M, D), with zeros for padding unless that is read."""
        (mask,) = others
        return state if self.padding else state * mask[..., None].to(state.dtype)

    @property
    def returned(self) -> dict[int, str]:
        """Maps a layer's index to the output that is taken after it; none is the embedding."""
        return {state - 1: f"hidden_states.{state}" for state in self.states} or {len(self.layers) - 1: _LAST}

    @staticmethod
    def around(shared: torch.Tensor, tokens: torch.Tensor, *others: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return cosine and sine of the positions, (M, head width) each, and what is added to scores (B, 1, M, M)."""
        return turns(shared, tokens.shape[1]), score_bias(*others)

    @staticmethod
    def run(layer: Any, hidden: torch.Tensor, *around: Any) -> torch.Tensor:
        """Run one layer, see `run_layer`."""
        return run_layer(layer, hidden, *around)

    def reference(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the same outputs with the model's own forward pass."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        return tuple(self.as_read(out.hidden_states[state], attention_mask) for state in self.states or (-1,))

    def example(self, *, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random words, then padding; each row has another length."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.config.vocab_size, (batch, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(batch):
            end = tokens - row * (tokens // batch)
            ids[row, end:], mask[row, end:] = self.config.vocab_size - 1, 0
        return {"input_ids": ids, "attention_mask": mask}


def speeds_of(config: Any) -> torch.Tensor:
    """Return the angle by which each pair of a head's channels turns from token to token: (head width / 2).

    Positions that are scaled are refused before, by `part_shapes`.
    """
    found = getattr(config, "rope_parameters", None) or {}  # where transformers 5 has it
    theta = float(found["rope_theta"]) if "rope_theta" in found else float(config.rope_theta)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def turns(speeds: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the positions, (M, head width) each, from the speeds (head width / 2)."""
    angles = torch.arange(tokens, device=speeds.device)[:, None].float() * speeds
    twice = torch.cat((angles, angles), dim=-1)
    return twice.cos(), twice.sin()


def score_bias(mask: torch.Tensor) -> torch.Tensor:
    """Return what is added to attention's scores (B, 1, M, M) by a mask (B, M): a token sees none later, no padding."""
    places = torch.arange(mask.shape[1], device=mask.device)
    seen = torch.logical_and((places[None, :] <= places[:, None])[None], mask[:, None, :] > 0)  # Core ML knows no `&`
    return torch.where(seen, 0.0, torch.finfo(torch.float16).min)[:, None]  # finite in every dtype, and nothing in exp


def run_layer(
    layer: Any, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor
) -> torch.Tensor:
    """Run one layer; what it adds to the stream is computed in the dtype of its norms.

    Args:
        layer: of the model.
        hidden: (B, M, D), float32.
        angles: cosine and sine of the positions, (M, head width) each.
        bias: added to attention's scores (B, 1, M, M).
    """
    dtype = layer.input_layernorm.weight.dtype
    hidden = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden).to(dtype), angles, bias)
    return hidden + cast("torch.Tensor", layer.mlp(layer.post_attention_layernorm(hidden).to(dtype)))


def _attention(
    attention: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor
) -> torch.Tensor:
    heads = (*x.shape[:2], -1, attention.head_dim)
    q, k = (project(x).view(heads) for project in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (_rotated(y.transpose(1, 2), angles).to(x.dtype) for y in (q, k))
    v = attention.v_proj(x).view(heads).transpose(1, 2)
    shared = attention.num_key_value_groups
    k, v = (y[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for y in (k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(x.dtype), scale=attention.scaling)
    return cast("torch.Tensor", attention.o_proj(out.transpose(1, 2).flatten(2)))


def _rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn each channel (B, H, M, head width) with the one half a head further on."""
    first, second = x.chunk(2, dim=-1)
    return x * angles[0] + torch.cat((-second, first), dim=-1) * angles[1]
