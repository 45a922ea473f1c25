"""Text for a terminal: names and prompts that somebody else wrote cannot move its cursor or change its colours.

What it leaves out: rich markup, which callers turn off, and HTML, which templates escape.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with its line breaks; control characters, and marks that reorder what is shown, are spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
