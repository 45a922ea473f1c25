"""Runs a network in pieces, so that the process stays within a limit; knows nothing of a format.

As many blocks as fit are opened together and stay; the others are opened, run and dropped one after the other at each
call. All rows of a call go through a piece before the next is opened: with guidance, that halves the opening.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.heap import trim
from edgeprune.common.memory import resident
from edgeprune.common.pieces import RESERVE, Sizes
from edgeprune.runtimes.base import Array

TABLE = 10**7
"""Bytes of a table from which rows are looked up without opening it: text encoders have up to 0.3 GB of embeddings."""


class Part(Protocol):
    """A part of a network that runs by itself; only its file knows what else it is."""

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that its inputs are, in their order."""
        ...

    @property
    def makes(self) -> tuple[int, ...]:
        """The values that its outputs are, in their order."""
        ...


@dataclass(frozen=True)
class Lookup:
    """Rows of a table that stays in its mapped file."""

    table: Any
    """The mapped array (rows, width)."""
    kind: Any
    """The type of the numbers that are returned."""
    reads: tuple[int, ...]
    """The value that is the rows' indices."""
    makes: tuple[int, ...]

    def __call__(self, feed: Sequence[Any]) -> list[Any]:
        """Return the rows of these indices (B, tokens), as one array (B, tokens, width)."""
        return [np.asarray(self.table[np.asarray(feed[0])], self.kind)]


class Graph(Protocol):
    """A network at fixed sizes of its inputs."""

    inputs: dict[str, int]
    """The values that are its inputs, by name."""
    outputs: dict[str, int]
    """The values that it returns, by name."""

    def measured(self) -> Sizes:
        """Return its operations with the bytes of all values."""
        ...

    def cut(self, ranges: Sequence[range]) -> Sequence[Part]:
        """Return a part, or a `Lookup`, for each range of operations; the ranges are in order and without gaps."""
        ...


class Opened(Protocol):
    """A part that is ready to run."""

    def __call__(self, feed: Sequence[Any]) -> Sequence[Any]:
        """Return all outputs, in their order, for all inputs in theirs."""
        ...

    def rest(self) -> None:
        """Free what it has for values until the next run."""
        ...


class NetworkFile(Protocol):
    """A file that holds a network. Its weights are mapped."""

    device: str
    """Where it computes, in the runtime's own term."""
    why: str
    """Why it computes there."""
    kinds: dict[str, Any]
    """The type of each input, by name."""

    def graph(self, shapes: Mapping[str, Sequence[int]]) -> Graph:
        """Return the network with inputs of these shapes.

        Raises:
            InputError: an input is missing, or the network does not take one of this shape.
        """
        ...

    def opened(self, part: Any) -> Opened:
        """Open a part of a graph of this file."""
        ...

    def ahead(self, part: Any) -> None:
        """Ask the operating system to read the weights of a part, which is opened soon."""
        ...

    def close(self) -> None:
        """Remove what was written for it."""
        ...


class PiecewiseNetwork:
    """The `Network` whose parts are in memory in turn.

    Args:
        file: the network.
        limit: most bytes of the process.
    """

    def __init__(self, file: NetworkFile, limit: int) -> None:
        self._file: NetworkFile | None = file
        self._limit = limit
        self.provider, self.why = file.device, file.why
        self._at_once = 1
        """Sets of inputs that go through a piece before the next is opened."""
        self._planned: tuple[dict[str, list[int]], int] | None = None
        self._pieces: Sequence[Part] = []
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._resident: int | None = None
        self._kept: Opened | None = None

    def largest_batch(self, name: str) -> None:
        """Return None: the sizes of an export's models are dynamic."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        (outputs,) = self.many([arrays])
        return outputs

    def many(self, feeds: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Array]]:
        """Yield the outputs by name, float32, for each set of inputs; all sets have the same shapes."""
        if self._file is None:
            raise InputError("the runtime is closed; load the folder again")
        self._plan(self._file, {name: list(np.shape(value)) for name, value in feeds[0].items()}, len(feeds))
        size = self._at_once
        for start in range(0, len(feeds), size):
            yield from self._through(self._file, feeds[start : start + size])

    def _through(self, file: NetworkFile, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        """Carry sets of inputs through one piece after the other."""
        kinds = file.kinds
        states = [{value: np.asarray(feed[n], kinds[n]) for n, value in self._inputs.items()} for feed in feeds]
        for index, piece in enumerate(self._pieces):
            opened = self._opened(file, index)
            self._ahead(file, index)
            later = {value for other in self._pieces[index + 1 :] for value in other.reads} | {*self._outputs.values()}
            for state in states:
                made = opened([state[value] for value in piece.reads])
                state.update(zip(piece.makes, made, strict=True))
                for value in state.keys() - later:
                    del state[value]
            del opened, made
            if index == self._resident and len(self._pieces) > 1 and self._kept is not None:
                self._kept.rest()  # so that the other pieces can have that memory
            trim()
        return [{n: np.asarray(state[value], np.float32) for n, value in self._outputs.items()} for state in states]

    def _ahead(self, file: NetworkFile, index: int) -> None:
        """Let the part that is opened next be read from the disk while the one of this index computes."""
        order = [*range(index + 1, len(self._pieces)), *range(index)]
        following = (i for i in order if i != self._resident and not isinstance(self._pieces[i], Lookup))
        if (i := next(following, None)) is not None:
            file.ahead(self._pieces[i])

    def _plan(self, file: NetworkFile, shapes: dict[str, list[int]], rows: int) -> None:
        """Cut the network for inputs of these shapes, unless it is."""
        if self._planned is not None and self._planned[0] == shapes and rows <= self._planned[1]:
            return
        self._planned, self._kept, self._pieces = None, None, []
        trim()
        graph = file.graph(shapes)
        sizes, room = graph.measured(), self._limit - RESERVE - resident()
        self._at_once = sizes.at_once(room, rows)
        layout = sizes.layout(room, self._at_once)
        self._inputs, self._outputs, self._resident = graph.inputs, graph.outputs, layout.resident
        self._pieces = graph.cut(layout.parts)
        self._planned = shapes, rows

    def _opened(self, file: NetworkFile, index: int) -> Opened | Lookup:
        piece = self._pieces[index]
        if isinstance(piece, Lookup):
            return piece
        if index != self._resident:
            return file.opened(piece)
        self._kept = self._kept or file.opened(piece)
        return self._kept

    def close(self) -> None:
        """Drop everything; the runtime then frees its memory."""
        self._planned, self._kept, self._pieces = None, None, []
        if self._file is not None:
            self._file.close()
        self._file = None
