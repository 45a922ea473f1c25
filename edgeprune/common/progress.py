"""How long work reports its progress: one callable type for every room."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called when a step begins, and after each part of it; one step always has the same text."""

    def __call__(self, what: str, done: int = 0, total: int = 0, note: str = "", /) -> None:
        """Report `done` of `total` and a note (bytes, speed); a step without parts is reported by its text alone."""


def silent(what: str, done: int = 0, total: int = 0, note: str = "", /) -> None:
    """Report nothing."""


class Steps:
    """Counts steps of equal weight and reports each one."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress, self._done = what, total, progress, 0

    def __call__(self, *_: object) -> None:
        """Count one more step as done."""
        self._done += 1
        self._progress(self._what, self._done, self._total)
