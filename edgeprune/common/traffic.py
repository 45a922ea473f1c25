"""Count the bytes of files that this process reads and writes, where they are opened.

What the operating system has cached counts like any other byte, so that the figures are the same on every machine.
Configs, headers of weights, and what other libraries read (tokenizers, images) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes since the process began."""

    read_bytes: int = 0
    written_bytes: int = 0

    def since(self, earlier: Traffic) -> Traffic:
        """Return what was read and written after `earlier`, an earlier `total()`."""
        return Traffic(self.read_bytes - earlier.read_bytes, self.written_bytes - earlier.written_bytes)


_TOTAL = Traffic()


def total() -> Traffic:
    """Return the bytes up to now."""
    return Traffic(_TOTAL.read_bytes, _TOTAL.written_bytes)


def add(*, read: int = 0, written: int = 0) -> None:
    """Count bytes that were read or written."""
    _TOTAL.read_bytes += read
    _TOTAL.written_bytes += written
