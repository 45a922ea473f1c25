"""The modulation of an export that has it apart from the transformer: its rows, made before the first step.

A row (T numbers) is what all modulation layers of a transformer return for one prompt at one noise level: 4.4 MB of
SD3.5 Large. A step needs one for each prompt. The rows of all steps of the images that are drawn together wait in a
temporary file, as values of strips do; those of the next images replace them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.fields import LARGEST, MOST_BLOCKS, whole_number
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.strip_store import Store
from edgeprune.runtimes.strips import Rows

ROWS = "modulation"
"""The network that makes the rows, its output, and the input of the transformer that reads them."""
WIDTH = "modulation_width"
"""T in edgeprune_export.json; absent if the transformer has its modulation inside."""
AT_ONCE = 8
"""Rows of one call of the network."""
SMALL = 10**8
"""Most bytes of a network that stays open from image to image: opening it would take longer than running it."""
ROOM = 10**9
"""Most bytes that the network takes when it runs in pieces, even if more are free: about as many as the values of the
transformer, which follows it, so that it does not raise the peak of the process."""
HELD = 2**24
"""Most bytes of rows that are kept in memory."""

Key = tuple[float, float, bytes]
"""Noise level, guidance scale and pooled text: all that a row depends on."""


def keys_of(pooled: Array, sigma: Array, guidance: float) -> list[Key]:
    """Return the keys of texts (B, P) at noise levels (B)."""
    return [(float(np.float32(level)), guidance, text.tobytes()) for text, level in zip(pooled, sigma, strict=True)]


class Table:
    """Rows (T) by their keys.

    Args:
        width: T.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._places: dict[Key, int] = {}
        self._store = Store()

    @classmethod
    def of(cls, exported: Mapping[str, Any], path: Path) -> Table | None:
        """Return an empty table of the rows of an export; None if its transformer has the modulation inside.

        Args:
            exported: the content of its edgeprune_export.json.
            path: that file, for the error.

        Raises:
            InputError: their width is not one of a model.
        """
        if WIDTH not in exported:
            return None
        return cls(whole_number(exported, WIDTH, path, most=MOST_BLOCKS * LARGEST))

    def has(self, keys: Iterable[Key]) -> bool:
        """Return whether it has all of these."""
        return self._places.keys() >= set(keys)

    def fill(self, keys: Sequence[Key], made: Iterable[Array]) -> None:
        """Replace its content.

        Args:
            keys: of the rows, in order; none twice.
            made: the rows, in arrays (N, T). What is left over of the last is dropped.

        Raises:
            DiskError: the disk is full.
        """
        self.clear()
        if 4 * len(keys) * self.width <= HELD:
            self._store.hold(0, np.empty((len(keys), self.width), np.float32))
        else:
            self._store.create(0)
        layout, start = self._layout(len(keys)), 0
        for rows in made:
            part = rows[: len(keys) - start]
            self._store.write(0, layout, start, part[None])
            start += len(part)
        self._places = {key: place for place, key in enumerate(keys)}

    def __getitem__(self, keys: Sequence[Key]) -> Array:
        """Return rows (B, T)."""
        out = np.empty((len(keys), self.width), np.float32)
        for row, key in zip(out, keys, strict=True):
            self._store.read(0, self._layout(len(self._places)), self._places[key], row[None, None])
        return out

    def _layout(self, count: int) -> Rows:
        return Rows(axis=0, outer=1, count=count, inner=self.width)

    def clear(self) -> None:
        """Drop all rows, and the file."""
        self._store.drop(0)
        self._store, self._places = Store(), {}
