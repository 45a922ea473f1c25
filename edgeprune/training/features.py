"""Forward hooks that collect the outputs of blocks by original index, also under DDP, FSDP and DeepSpeed wrappers.

losses.py compares the outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.families import Family
from edgeprune.training.losses import Features


class Catcher:
    """Collects the outputs of blocks, or of their attention, by the original model's block index."""

    def __init__(self, family: Family, model: nn.Module, originals: list[int], features: str) -> None:
        self.features: Features = {}
        self._hooks = []
        for block, original in zip(family.blocks(model), originals, strict=True):
            module = block if features == "blocks" else family.attention(block)
            if module is not None:
                hook = module.register_forward_hook(lambda _, __, out, key=original: self._catch(key, out))
                self._hooks.append(hook)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _catch(self, key: int, out: Any) -> None:
        context, image = (None, out) if isinstance(out, torch.Tensor) else out  # one stream, or context first
        self.features[key] = (image,) if context is None else (image, context)
