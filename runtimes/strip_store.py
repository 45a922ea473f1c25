"""Values of which only strips are in memory; the rest is in files of a temporary folder.

Files are read and written explicitly: the pages of a mapped file would count as this process's memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgeprune.common.errors import DiskError
from edgeprune.common.files import cannot_write
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.strips import Rows


class Store:
    """A context manager; at its end all values are gone, and also after a kill: their files have no names.

    They are where Python makes temporary files; the environment variable TMPDIR chooses another disk.
    """

    def __init__(self) -> None:
        self._files: dict[int, Any] = {}
        self._held: dict[int, Array] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for value in list(self._files):
            self.drop(value)

    def hold(self, value: int, array: Array) -> None:
        """Read and write a value in this array, in memory."""
        self._held[value] = array

    def create(self, value: int) -> None:
        """Make room for a value.

        Raises:
            DiskError: no file can be made.
        """
        if value in self._held:
            return
        try:
            self._files[value] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # `drop` closes it
        except OSError as error:
            raise cannot_write(Path(tempfile.gettempdir()), error) from error

    def drop(self, value: int) -> None:
        """Remove a value; what is held stays."""
        if (file := self._files.pop(value, None)) is not None:
            file.close()

    def read(self, value: int, rows: Rows, start: int, into: Array) -> None:
        """Read rows from `start` on into an array (outer, rows, inner)."""
        if value in self._held:
            whole = self._held[value].reshape(rows.outer, rows.count, rows.inner)
            into[...] = whole[:, start : start + into.shape[1]]
            return
        for place, part in self._parts(rows, start, into):
            self._files[value].seek(place)
            view = part.reshape(-1).view(np.uint8).data
            while view:
                count = self._files[value].readinto(view)
                if not count:
                    raise DiskError(
                        f"{tempfile.gettempdir()}: a temporary file ended early; another program changed it"
                    )
                view = view[count:]

    def write(self, value: int, rows: Rows, start: int, strip: Array) -> None:
        """Write an array (outer, rows, inner) as the rows from `start` on.

        Raises:
            DiskError: the disk is full.
        """
        if value in self._held:
            self._held[value].reshape(rows.outer, rows.count, rows.inner)[:, start : start + strip.shape[1]] = strip
            return
        file = self._files[value]
        try:
            for place, part in self._parts(rows, start, strip):
                file.seek(place)
                view = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise cannot_write(Path(tempfile.gettempdir()), error) from error

    @staticmethod
    def _parts(rows: Rows, start: int, strip: Array) -> list[tuple[int, Array]]:
        """Return the pieces of a strip that are in one piece in the file, each with its place there in bytes."""
        if strip.shape[1] == rows.count:
            return [(0, strip)]
        row = 4 * rows.inner
        return [(row * (outer * rows.count + start), strip[outer]) for outer in range(rows.outer)]
