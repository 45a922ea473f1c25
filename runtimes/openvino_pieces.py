"""Runs an OpenVINO network in pieces, so that the process stays within a limit.

As many blocks as fit are compiled together and stay; the others are compiled, run and dropped one after the other at
each call. All rows of a call go through a piece before the next is compiled: with guidance, that halves the compiling.
"""

from __future__ import annotations

# This file's folder on sys.path would hide OpenVINO's own package; see openvino.py.
if __name__ != "edgeprune.runtimes.openvino_pieces":
    raise ImportError(f"import this module as edgeprune.runtimes.openvino_pieces, not as {__name__}")

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.heap import trim
from edgeprune.common.memory import resident
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.openvino_graph import Graph, Lookup, Piece
from edgeprune.runtimes.pieces import RESERVE

if TYPE_CHECKING:
    from edgeprune.runtimes.openvino import Compiled, OpenVinoFile


class OpenVinoPieces:
    """A network whose parts are in memory in turn.

    Args:
        file: the network.
        limit: most bytes of the process.
    """

    def __init__(self, file: OpenVinoFile, limit: int) -> None:
        self._file: OpenVinoFile | None = file
        self._limit = limit
        self.provider, self.why = file.device, f"device={file.device}"
        self._at_once = 1
        """Sets of inputs that go through a piece before the next is opened."""
        self._planned: tuple[dict[str, list[int]], int] | None = None
        self._pieces: list[Piece | Lookup] = []
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._resident: int | None = None
        self._kept: Compiled | None = None

    def largest_batch(self, name: str) -> None:
        """Return None: the sizes of an export's models are dynamic."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        return self.many([arrays])[0]

    def many(self, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        """Return the outputs by name, float32, for each set of inputs; all sets have the same shapes."""
        if self._file is None:
            raise InputError("the runtime is closed; load the folder again")
        self._plan(self._file, {name: list(np.shape(value)) for name, value in feeds[0].items()}, len(feeds))
        size = self._at_once
        groups = [feeds[start : start + size] for start in range(0, len(feeds), size)]
        return [outputs for group in groups for outputs in self._through(self._file, group)]

    def _through(self, file: OpenVinoFile, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        """Carry sets of inputs through one piece after the other."""
        kinds = file.kinds
        states = [{value: np.asarray(feed[n], kinds[n]) for n, value in self._inputs.items()} for feed in feeds]
        for index, piece in enumerate(self._pieces):
            compiled = self._opened(file, index)
            later = {value for other in self._pieces[index + 1 :] for value in other.reads} | {*self._outputs.values()}
            for state in states:
                made = compiled([state[value] for value in piece.reads])
                state.update(zip(piece.makes, made, strict=True))
                for value in state.keys() - later:
                    del state[value]
            if index == self._resident and len(self._pieces) > 1 and self._kept is not None:
                self._kept.rest()  # so that the other pieces can have that memory
            del compiled
            trim()
        return [{n: np.asarray(state[value], np.float32) for n, value in self._outputs.items()} for state in states]

    def _plan(self, file: OpenVinoFile, shapes: dict[str, list[int]], rows: int) -> None:
        """Cut the network for inputs of these shapes, unless it is."""
        if self._planned == (shapes, rows):
            return
        self._planned, self._kept, self._pieces = None, None, []
        trim()
        graph = Graph(file.read(shapes))
        sizes, room = graph.measured(), self._limit - RESERVE - resident()
        self._at_once = sizes.at_once(room, rows)
        layout = sizes.layout(room, self._at_once)
        self._inputs, self._outputs, self._resident = graph.inputs, graph.outputs, layout.resident
        self._pieces = graph.cut(layout.parts)
        self._planned = shapes, rows

    def _opened(self, file: OpenVinoFile, index: int) -> Compiled | Lookup:
        piece = self._pieces[index]
        if isinstance(piece, Lookup):
            return piece
        if index != self._resident:
            return file.compiled(piece.model, part=True)
        self._kept = self._kept or file.compiled(piece.model, part=True)
        return self._kept

    def close(self) -> None:
        """Drop everything; OpenVINO then frees its memory."""
        self._planned, self._kept, self._pieces = None, None, []
        if self._file is not None:
            self._file.close()
        self._file = None
