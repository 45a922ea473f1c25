"""The largest activation of a network, and the module where it is.

All numbers count that enter or leave a layer with weights (linear, convolution, norm). What stays inside one function,
such as the products of queries and keys, is not seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Peak:
    """The largest absolute value that was seen so far; infinite once a value was NaN or infinite."""

    value: float = 0.0
    module: str = ""
    """Name of the module in its network."""

    def see(self, module: str, values: Any) -> None:
        """Compare with a tensor, or with those in a tuple or list."""
        if isinstance(values, (tuple, list)):
            for value in values:
                self.see(module, value)
        elif isinstance(values, torch.Tensor) and values.is_floating_point() and values.numel():
            low, high = torch.aminmax(values.detach())
            largest = max(abs(float(low)), abs(float(high)))
            largest = largest if math.isfinite(largest) else math.inf
            if largest > self.value:
                self.value, self.module = largest, module


@contextlib.contextmanager
def watched(network: nn.Module, read: Callable[[str], bool] = lambda module: True) -> Iterator[Peak]:
    """Yield the peak of a network that runs inside the context.

    Args:
        network: all of it.
        read: whether a module of this name counts.
    """
    peak = Peak()
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: peak.see(name, (inputs, output)))
        for name, module in network.named_modules()
        if read(name)
        and any(True for _ in module.parameters(recurse=False))
        and not any(True for _ in module.children())
    ]
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()
