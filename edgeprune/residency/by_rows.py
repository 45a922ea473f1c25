"""Let a batch pass through a layer a few rows at a time: its activations then take the memory of these rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def by_rows(layer: nn.Module, rows_of: Callable[[torch.Tensor], int]) -> None:
    """Make a layer take a few rows at a time, inside of its hooks: a streamed layer is read once for all of them.

    Args:
        layer: of a text encoder. It gets its stream (B, M, D) first, and returns the new one, alone or first in a
            tuple. What else it returns must be the same for all rows, as T5's position biases are.
        rows_of: returns how many rows of a stream run together.
    """
    whole = layer.forward

    def forward(stream: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        count, rows = len(stream), rows_of(stream)
        if rows >= count:
            return whole(stream, *arguments, **options)

        def cut(value: Any, part: slice) -> Any:
            """Return the rows of what has one for each of the stream's, such as a mask (B, 1, M, M)."""
            of_rows = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == count
            return value[part] if of_rows else value

        found = torch.empty_like(stream)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            options_of = {name: cut(value, part) for name, value in options.items()}
            out = whole(stream[part], *(cut(value, part) for value in arguments), **options_of)
            found[part] = out if isinstance(out, torch.Tensor) else out[0]
        if isinstance(out, torch.Tensor):
            return found
        return found, *(value[:1] if isinstance(value, torch.Tensor) else value for value in out[1:])

    layer.forward = forward
