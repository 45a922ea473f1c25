"""How long-running work reports its progress: one callable type for every room."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with what is being done, how much of it is done, how much there is, and a note such as the speed."""


def silent(what: str, done: int, total: int, note: str) -> None:
    """Report nothing."""
