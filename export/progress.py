"""How an export tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what begins, or with a total how far it is; the same text for the same part."""

    def __call__(self, what: str, done: int = 0, total: int = 0, note: str = "", /) -> None:
        """`done` of `total` steps and bytes and speed; a line of text alone where there are no steps."""


def silent(what: str, done: int = 0, total: int = 0, note: str = "", /) -> None:
    """No progress."""


class Steps:
    """Counts steps of equal worth and tells of each."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress, self._done = what, total, progress, 0

    def __call__(self, *_: object) -> None:
        """One more is done."""
        self._done += 1
        self._progress(self._what, self._done, self._total)
