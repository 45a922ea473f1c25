"""Run a text encoder whose layers are read when they run: how many prompts at once, and what is kept of it.

Notation: B prompts, M tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.families.encoders import CLIP, CLIP_POOLED, LANGUAGE, QWEN2_5_VL, T5
from edgeprune.residency.compute import Compute
from edgeprune.residency.running import spare
from edgeprune.sampling.together import batches_together, rows_together

AT_ONCE = 64
"""Most prompts that are in a layer together."""
OUTPUTS = {
    CLIP: "text_embeds", CLIP_POOLED: "pooler_output", T5: "last_hidden_state", QWEN2_5_VL: "last_hidden_state",
}  # fmt: skip
"""What is read of an encoder's result, besides hidden states."""
_SCORES, _INNER, _WIDE = 3, 5, 6
"""Numbers that are alive at once in a layer, for each token: scores of each head, inner widths of its MLP, widths."""
_STREAMS, _KEPT = 2, 2
"""Streams of a prompt that are alive between two layers: before and after, and two that are kept of CLIP. T5 has as
much room; of Qwen3 those of its states are kept."""
_ROWS_SHARE = 8
"""Prompts that are in a layer together take at most 1/8 of the memory that was given, whatever is free: products of
other row counts differ in their last bits."""
_MOST_BYTES = 10**9
"""That they take where no memory was given, and half of what is left at most."""


def layers_of(model: nn.Module, kind: str) -> Iterable[tuple[str, nn.Module]]:
    """Return a text encoder's layers in their order, with the prefix of their tensors' names."""
    of = "encoder.block" if kind == T5 else "model.layers" if kind in LANGUAGE else "encoder.layers"
    found = next(name for name, _ in model.named_modules() if name.endswith(of))
    for index, layer in enumerate(model.get_submodule(found).children()):
        yield f"{found}.{index}.", layer


def prompts_together(
    encoder: Any, kind: str, compute: Compute, count: int, length: int, states: Sequence[int] = ()
) -> int:
    """Return how many of `count` prompts of `length` tokens pass through each layer before the next is read.

    Args:
        encoder: the network.
        kind: its class.
        compute: where it computes.
        count: prompts.
        length: tokens of each.
        states: the hidden states that are kept of Qwen3.
    """
    wide = encoder.config.d_model if kind == T5 else encoder.config.hidden_size
    one = (_STREAMS + (len(states) or _KEPT)) * length * wide * encoder.dtype.itemsize
    return batches_together(spare(encoder, compute, count * one), one, count)


def rows_of(kind: str, config: Any, compute: Compute) -> Callable[[torch.Tensor], int]:
    """Return what says how many prompts of a stream (B, M, D) are in a layer together, for `by_rows`."""
    if kind == T5:
        wide, heads, inner = config.d_model, config.num_heads, config.d_ff
    else:
        wide, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size

    def rows(stream: torch.Tensor) -> int:
        count, length, _ = stream.shape
        # In float32, as the softmax computes.
        one = 4 * length * (_SCORES * heads * length + _INNER * inner + _WIDE * wide)
        room = min(_MOST_BYTES, compute.left() // 2) if compute.memory is None else compute.memory // _ROWS_SHARE
        return rows_together(room, one, min(count, AT_ONCE))

    return rows


def said(
    encoder: Any,
    kind: str,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    states: Sequence[int] = (),
    *,
    padding: bool = True,
) -> dict[str, torch.Tensor]:
    """Return what a text encoder says of token ids, under the names that `Network.join` reads.

    Of CLIP's hidden states the last two are kept, of which `join` reads one; transformers would keep all.

    Args:
        encoder: the network.
        kind: its class.
        ids: (B, M).
        mask: (B, M), 1 at tokens and 0 at padding; None for encoders that read padding.
        states: the hidden states that are kept of a language model, 0 is the embedding; none for its last one, normed.
        padding: whether those of padding are kept; else they are 0.
    """
    layers = [layer for _, layer in layers_of(encoder, kind)]
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for state in (len(layers) - 1, len(layers)) if kind == CLIP else states:

        def keep(_: Any, arguments: Any, out: Any, state: int = state) -> None:
            value = arguments[0] if state < len(layers) else out
            found[f"hidden_states.{state}"] = value if isinstance(value, torch.Tensor) else value[0]

        hooks.append(layers[min(state, len(layers) - 1)].register_forward_hook(keep))
    try:
        if kind in LANGUAGE:
            last = encoder.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            found = found if states else {OUTPUTS[kind]: last}
            if not padding and mask is not None:
                found = {name: state * mask[..., None] for name, state in found.items()}
            return found
        return {OUTPUTS[kind]: encoder(ids)[OUTPUTS[kind]]} | found
    finally:
        for hook in hooks:
            hook.remove()
