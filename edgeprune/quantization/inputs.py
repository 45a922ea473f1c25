"""What layers get while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

Take = Callable[[str, torch.Tensor], None]
"""Gets a layer's name and its input (..., I)."""


@torch.no_grad()
def watch(layers: Mapping[str, nn.Linear], run: Callable[[], None], take: Take) -> None:
    """Run `run`, and pass the input of every call of the layers to `take`."""
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: take(n, args[0])) for n, m in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
