"""Safe terminal output: names and prompts written by others cannot move the cursor or change colours.

Callers turn off rich markup themselves, and templates escape HTML.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text with control and bidirectional characters escaped; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
