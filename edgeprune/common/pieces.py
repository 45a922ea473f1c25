"""Which parts of a network stay in memory, where it is cut for that, and how much memory each part takes.

Knows nothing of a format. A runtime describes its graph as `Operation`s in execution order, with the bytes of weights
that each reads first and the values that it reads and makes. A cut goes where few bytes pass from one piece to the
next, which in a transformer is between two blocks. PyTorch has its blocks as modules, which nobody has to cut: it asks
only how many of them stay. Torch-free, since runtimes on a device plan with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeprune.common.errors import InputError


class UncountableError(InputError):
    """What a network takes follows from more than its file and the shapes of its inputs."""


LEAST = 1 / 3
"""A piece holds at least this share of the most weights, so that no cheap cut near its beginning makes it tiny."""


@dataclass(frozen=True)
class Operation:
    """One operation of a graph. Values have numbers; the network's inputs are values, weights are not."""

    weights: int
    """Bytes of the weights, as opened, that no earlier operation reads; of one that is `alone`, where it is not."""
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    converted: int = 0
    """The part of `weights` that is not stored like that: there are two copies while it is opened."""
    alone: bool = False
    """Whether it is a piece of its own, which the runtime computes by other means: a lookup in a large table."""


def staying(count: int, takes: Callable[[int], int], room: int) -> int:
    """Return how many parts of a network stay in memory at most, the first ones; the others are read when they run.

    Args:
        count: all parts.
        takes: returns the bytes that the network takes if so many stay.
        room: bytes that it may take.
    """
    return next((stay for stay in range(count, 0, -1) if takes(stay) <= room), 0)


def cuts(operations: Sequence[Operation], sizes: Sequence[int], most: int, kept: Iterable[int]) -> list[range]:
    """Return the pieces: ranges of operations that together are all, in order.

    Args:
        operations: all, in execution order.
        sizes: bytes of each value.
        most: bytes of weights in a piece; a single operation with more is a piece of its own.
        kept: the values that the network returns.
    """
    crossing = _crossing(operations, sizes, kept)
    out, start = [], 0
    while start < len(operations):
        weights, ends = 0, list[tuple[int, int]]()
        alone = (index for index in range(start, len(operations)) if operations[index].alone)
        last = next(alone, len(operations))
        last += last == start
        for end in range(start + 1, last + 1):
            weights += operations[end - 1].weights
            if weights > most and ends:
                break
            ends.append((end, weights))
        if ends[-1][0] < last:
            ends = [(end, held) for end, held in ends if held >= LEAST * most] or ends[-1:]
            stop = min(ends, key=lambda one: (crossing[one[0]], -one[0]))[0]
        else:
            stop = last
        out.append(range(start, stop))
        start = stop
    return out


def working(operations: Sequence[Operation], sizes: Mapping[int, int] | Sequence[int], kept: Iterable[int]) -> int:
    """Return the most bytes of values that are alive at one time in a piece.

    It is an upper bound: a runtime fuses operations, and then some of these values never exist.

    Args:
        operations: of the piece.
        sizes: bytes of each value.
        kept: the values that later pieces read, or that the network returns.
    """
    last = {value: index for index, one in enumerate(operations) for value in (*one.makes, *one.reads)}
    last |= dict.fromkeys(kept, len(operations))
    made = {value for one in operations for value in one.makes}
    alive = sum(sizes[value] for value in last if value not in made)  # the inputs
    most = alive
    for index, one in enumerate(operations):
        alive += sum(sizes[value] for value in one.makes)
        most = max(most, alive)
        alive -= sum(sizes[value] for value in {*one.makes, *one.reads} if last[value] == index)
    return most


def _crossing(operations: Sequence[Operation], sizes: Sequence[int], kept: Iterable[int]) -> list[int]:
    """Return the bytes that are made before, and read at or after, each operation; one more for the end."""
    first = {value: index for index, one in enumerate(operations) for value in one.makes}
    last = {value: index for index, one in enumerate(operations) for value in one.reads}
    last |= dict.fromkeys(kept, len(operations))
    change = [0] * (len(operations) + 2)
    for value, index in first.items():
        if (end := last.get(value, -1)) > index:
            change[index + 1] += sizes[value]
            change[end + 1] -= sizes[value]
    out, alive = [], 0
    for index in range(len(operations) + 1):
        alive += change[index]
        out.append(alive)
    return out


# ------------------------------------------------------------------------------------- what they take

PIECE_BYTES = 200_000_000
"""Most bytes of weights in a piece that is opened and closed at each run: one or two blocks. Half as many where that
takes too much memory."""
RESERVE = 200_000_000
"""Bytes that a process needs besides: the runtime's libraries and compiled code, what its allocator holds back."""
SLACK = 1.25
"""Bytes that a runtime takes for values, by those that are alive: operations have buffers of their own."""
MAPPED = 300_000_000 if sys.platform == "linux" else sys.maxsize
"""Most bytes of a weight file that are mapped while its weights are repacked. Only Linux evicts them (mapped.py)."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a network adds to a process, at most, besides RESERVE."""

    whole: int
    """Opened as it is."""
    least: int
    """In the smallest pieces, one open at a time."""


@dataclass(frozen=True)
class Layout:
    """How a network runs within a limit."""

    parts: list[range]
    """Of its operations, in order."""
    resident: int | None
    """Which part stays open."""


@dataclass(frozen=True)
class Sizes:
    """A network's operations at given sizes of its inputs."""

    operations: Sequence[Operation]
    """In execution order."""
    values: Sequence[int]
    """Bytes of each value."""
    inputs: Sequence[int]
    """The values that it is given."""
    outputs: Sequence[int]
    """The values that it returns."""

    def needs(self) -> Needs:
        """Return what the network takes."""
        return Needs(self._opened(range(len(self.operations))), self._streamed(self._smallest(0), rows=1))

    def layout(self, room: int, rows: int) -> Layout:
        """Return the layout that keeps as many weights open as fit.

        Args:
            room: bytes that the network may take.
            rows: the sets of inputs that go through a piece before the next is opened.
        """
        smallest = self._smallest(room)
        if smallest != self._cuts(PIECE_BYTES):
            return Layout(smallest, resident=None)
        between = self._between(smallest, rows)
        first = max((i + 1 for i, part in enumerate(smallest) if self.operations[part.start].alone), default=0)

        def split(stay: int) -> tuple[range, list[range], list[range]]:
            stop = first + stay
            return range(smallest[first].start, smallest[stop - 1].stop), smallest[:first], smallest[stop:]

        def takes(stay: int) -> int:
            head, before, after = split(stay)
            rest = max(map(self._closed, (*before, *after)), default=0)
            return max(self._opened(head), self._weights(head) + rest) + between

        stay = staying(len(smallest) - first, takes, room)
        if not stay:
            return Layout(smallest, resident=None)
        head, before, after = split(stay)
        return Layout([*before, head, *after], resident=first)

    def at_once(self, room: int, rows: int) -> int:
        """Return how many of `rows` sets of inputs may go together through the smallest pieces; at least one."""
        smallest = self._smallest(room)
        while rows > 1 and self._streamed(smallest, rows) > room:
            rows = (rows + 1) // 2
        return rows

    def _smallest(self, room: int) -> list[range]:
        """Return pieces of up to PIECE_BYTES, or of half of that if one set of inputs does not go through these."""
        large = self._cuts(PIECE_BYTES)
        if self._streamed(large, rows=1) <= room:
            return large
        return min((large, self._cuts(PIECE_BYTES // 2)), key=lambda parts: self._streamed(parts, rows=1))

    def _cuts(self, most: int) -> list[range]:
        return cuts(self.operations, self.values, most, self.outputs)

    def _weights(self, part: range) -> int:
        return sum(self.operations[index].weights for index in part)

    def _converted(self, part: range) -> int:
        return sum(self.operations[index].converted for index in part)

    def _working(self, part: range) -> int:
        later = {value for one in self.operations[part.stop :] for value in one.reads} | set(self.outputs)
        inside = self.operations[part.start : part.stop]
        kept = later & {value for one in inside for value in one.makes}
        return int(SLACK * working(inside, self.values, kept))

    def _opened(self, part: range) -> int:
        weights = self._weights(part)
        return weights + min(weights, MAPPED) + self._converted(part) + self._working(part)

    def _closed(self, part: range) -> int:
        """Return what a part takes that is opened, run and closed: all of its file's pages may be mapped."""
        if self.operations[part.start].alone:
            return self._working(part)
        return 2 * self._weights(part) + self._converted(part) + self._working(part)

    def _between(self, parts: Sequence[range], rows: int) -> int:
        """Return the bytes of all values that wait for later parts, at most."""
        crossing = _crossing(self.operations, self.values, self.outputs)
        given = sum(self.values[value] for value in self.inputs)
        return rows * (given + max(crossing[part.stop] for part in parts))

    def _streamed(self, parts: Sequence[range], rows: int) -> int:
        return max(map(self._closed, parts)) + self._between(parts, rows)
