"""Checked fields of a file that someone else wrote: each has the expected type and range, or raises a one-line error.

Every number is bounded before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.common.errors import InputError

LARGEST = 65_536
"""The largest width, number of heads, channels or pixels accepted: ten times what exists today."""
MOST_BLOCKS = 1000
"""The most transformer blocks of one kind accepted."""


def shown(value: Any) -> str:
    """Return a value as error messages quote it: control characters escaped, long values truncated."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole_number(data: Mapping[str, Any], name: str, where: object, *, least: int = 1, most: int = LARGEST) -> int:
    """Return field `name`, a whole number from `least` to `most`.

    Args:
        where: the file, for the error.

    Raises:
        InputError: the field is missing, has another type or is out of range.
    """
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a whole number from {least} to {most}")
    return value


def real_number(data: Mapping[str, Any], name: str, where: object, *, least: float, most: float) -> float:
    """Return field `name`, a number from `least` to `most`.

    Raises:
        InputError: the field is missing, has another type, is NaN or is out of range.
    """
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a number from {least:g} to {most:g}")
    return float(value)


def text(data: Mapping[str, Any], name: str, where: object) -> str:
    """Return field `name`, a string.

    Raises:
        InputError: the field is missing or has another type.
    """
    value = data.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a string")
    return value


def texts(data: Mapping[str, Any], name: str, where: object) -> list[str]:
    """Return field `name`, a list of strings.

    Raises:
        InputError: the field is missing, is no list, or holds anything other than strings.
    """
    value = data.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected a list of strings")
    return value
