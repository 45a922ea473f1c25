"""Has parts of files read in the background, so that they are in memory when they are needed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_ADVISED = 128 << 10
"""Bytes to ask for at a time. Linux reads no more for one request than for reading ahead: 128 kB of the 400 MB of a
block by default."""


_wishes: list[Future[None]] = []


def read_ahead(path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Ask the operating system to read parts of a file in the background, or read them in a thread if it knows no such
    wish. Errors are left to whoever reads the file.

    Args:
        path: the file.
        spans: begin and end of each part.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        for wish in _wishes:  # what is still waiting comes too late
            wish.cancel()
        _wishes[:] = [_reading().submit(_read, path, list(spans))]
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        for start, size in _pieces(spans):
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def _pieces(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield begin and size of parts of at most _ADVISED bytes."""
    for begin, end in spans:
        for start in range(begin, end, _ADVISED):
            yield start, min(_ADVISED, end - start)


@functools.cache
def _reading() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "read ahead")


def _read(path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Read parts of a file, which leaves them in the system's cache."""
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        for start, size in _pieces(spans):
            file.seek(start)
            file.read(size)
