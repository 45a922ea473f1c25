"""Forward hooks that collect the outputs of blocks by original index, also under DDP, FSDP and DeepSpeed wrappers.

losses.py compares the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgeprune.families import Family
from edgeprune.training.losses import Features, Streams


class Catcher:
    """Collects the outputs of blocks, or of their attention, by the original model's block index."""

    def __init__(self, family: Family, model: nn.Module, originals: list[int], features: str) -> None:
        self.features: Features = {}
        self._hooks = []
        for block, original in zip(family.blocks(model), originals, strict=True):
            module, streams = (block, of_block) if features == "blocks" else (family.attention(block), of_attention)
            if module is not None:
                self._hooks.append(module.register_forward_hook(self._catch(original, streams)))

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _catch(self, key: int, streams: Callable[[nn.Module, Any], Streams]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            self.features[key] = streams(module, out)

        return hook


def of_block(_: nn.Module, out: Any) -> Streams:
    """Name the streams that a block returns: one, or the context (None after the last block) before the image."""
    context, image = (None, out) if isinstance(out, torch.Tensor) else out
    return {"image": image} if context is None else {"image": image, "context": context}


def of_attention(module: nn.Module, out: Any) -> Streams:
    """Name the streams that attention returns: one, or the image before the context.

    In SD3's last block the context is no output: diffusers returns it, but without the projection that it has in all
    other blocks.
    """
    image, context = (out, None) if isinstance(out, torch.Tensor) else out
    projected = getattr(module, "to_add_out", None) is not None
    return {"image": image} if context is None or not projected else {"image": image, "context": context}
