"""Tensors as files hold them, whatever the format: names, shapes and dtypes at once, numbers on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from edgeprune.families import Shape

if TYPE_CHECKING:
    import torch

AT_ONCE = 2**24
"""Numbers that are widened at once: 64 MB in float32."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes that are written as they are, with their bytes; all others become bfloat16."""
Rows = tuple[tuple[int, int], ...]


class Stored(Protocol):
    """The tensors of one file or folder."""

    shapes: dict[str, Shape]
    """Of every tensor that is a weight; scales and markers are not among them."""
    kinds: dict[str, str]
    """Dtype of each weight, such as BF16, F8_E4M3 or Q4_K."""
    rules: dict[str, int]
    """Tensors that are no weights: how many, by what they are."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one tensor, or its rows from the first up to the second number; dtypes not in FLOATS as bfloat16."""


def byte_size(shape: Shape, kind: str) -> int:
    """Return the bytes that a tensor takes once it is converted."""
    return math.prod(shape) * FLOATS.get(kind, 2)


def widened(count: int, width: int, part: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Return bfloat16 (count, width), made in pieces so that little of it is in float32 at any time.

    Args:
        count: rows.
        width: numbers in a row.
        part: returns float32 rows from the first up to the second number.
    """
    import torch

    out = torch.empty(count, width, dtype=torch.bfloat16)
    step = max(1, AT_ONCE // max(1, width))
    for start in range(0, count, step):
        out[start : start + step] = part(start, min(count, start + step)).reshape(-1, width)
    return out


def as_rows(shape: Shape) -> tuple[int, int]:
    """Return rows and numbers in a row."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def kinds_of(stored: Stored, names: Iterable[str]) -> list[str]:
    """Return the dtypes of these tensors, the one with most numbers first."""
    sizes: dict[str, int] = {}
    for name in names:
        sizes[stored.kinds[name]] = sizes.get(stored.kinds[name], 0) + math.prod(stored.shapes[name])
    return sorted(sizes, key=lambda kind: -sizes[kind])
