"""Numbers and tables as text: units, intervals, Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgeprune.common.errors import InputError

NOT_MEASURED = "-"
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def with_unit(key: str, value: float | int | None) -> str:
    """Return a value for people: GB and MB are 10^9 and 10^6 bytes, `-` stands for None.

    Args:
        key: the value's JSON key; bytes if it ends in `_bytes`, else seconds.
    """
    if value is None:
        return NOT_MEASURED
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def duration(seconds: float) -> str:
    """Return a time as people say it: `40 s`, `12 min`, `3.4 hours`, `35 days`."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("hours", 3600, 48)):
        if seconds < most * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if unit == "hours" and value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def parse_duration(text: str, option: str) -> float:
    """Return the seconds of a time such as 90s, 40m, 1.5h or 2d.

    Args:
        text: a number and its unit.
        option: its name, for the message.

    Raises:
        InputError: it is not such a time, or not above 0.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([a-z]+)", text.strip(), re.IGNORECASE | re.ASCII)
    seconds = float(match[1]) * _SECONDS.get(match[2].lower(), 0) if match else 0.0
    if seconds <= 0:
        raise InputError(f"{option}: found {text!r}, expected a time such as 90s, 40m or 2h")
    return seconds


def interval_text(values: Sequence[float | None], style: str = ".3f") -> str:
    """Return `value [low, high]`, each number in the format `style`; `value (n = 1)` where low and high are None."""
    value, low, high = values
    if low is None or high is None:
        return f"{value:{style}} (n = 1)"
    return f"{value:{style}} [{low:{style}}, {high:{style}}]"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, without a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
