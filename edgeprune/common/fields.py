"""Fields of a file that somebody else wrote: of the kind and in the range that is expected, or one line that says so.

A number is bounded before anything is built from it. What it leaves out: files as such (files.py), and what a field
means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.common.errors import InputError

LARGEST = 65_536
"""Of any width, count of heads, channels or pixels: ten times what there is."""
MOST_BLOCKS = 1000
"""Of one kind."""


def shown(value: Any) -> str:
    """A value as messages quote it: control characters escaped, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(data: Mapping[str, Any], name: str, where: object, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`.

    Raises:
        InputError: it is missing, of another kind or out of range.
    """
    found = data.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise InputError(f"{where}: {name}: found {shown(found)}, expected a whole number from {least} to {most}")
    return found


def real(data: Mapping[str, Any], name: str, where: object, *, least: float, most: float) -> float:
    """A number from `least` to `most`.

    Raises:
        InputError: it is missing, of another kind, no number or out of range.
    """
    found = data.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not least <= found <= most:
        raise InputError(f"{where}: {name}: found {shown(found)}, expected a number from {least:g} to {most:g}")
    return float(found)


def text(data: Mapping[str, Any], name: str, where: object) -> str:
    """A text.

    Raises:
        InputError: it is missing or of another kind.
    """
    found = data.get(name)
    if not isinstance(found, str):
        raise InputError(f"{where}: {name}: found {shown(found)}, expected a text")
    return found


def texts(data: Mapping[str, Any], name: str, where: object) -> list[str]:
    """A list of texts.

    Raises:
        InputError: it is missing, or something else is in it.
    """
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise InputError(f"{where}: {name}: found {shown(found)}, expected a list of texts")
    return found
