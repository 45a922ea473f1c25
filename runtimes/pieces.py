"""Where a network is cut into pieces that run one after the other, and how much memory each of them takes.

Knows nothing of a format: a runtime describes its graph as `Operation`s in execution order, with the bytes of weights
that each reads first and the values that it reads and makes. A cut goes where few bytes pass from one piece to the
next, which in a transformer is between two blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEAST = 1 / 3
"""A piece holds at least this share of the most weights, so that no cheap cut near its beginning makes it tiny."""


@dataclass(frozen=True)
class Operation:
    """One operation of a graph. Values have numbers; the network's inputs are values, weights are not."""

    weights: int
    """Bytes of the weights, as opened, that no earlier operation reads."""
    reads: tuple[int, ...]
    makes: tuple[int, ...]


def cuts(operations: Sequence[Operation], sizes: Mapping[int, int], most: int, kept: Iterable[int]) -> list[range]:
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
        weights, ends = 0, []
        for end in range(start + 1, len(operations) + 1):
            weights += operations[end - 1].weights
            if weights > most and ends:
                break
            ends.append((end, weights))
        if ends[-1][0] < len(operations):
            ends = [(end, held) for end, held in ends if held >= LEAST * most] or ends[-1:]
            stop = min(ends, key=lambda one: (crossing[one[0]], -one[0]))[0]
        else:
            stop = len(operations)
        out.append(range(start, stop))
        start = stop
    return out


def working(operations: Sequence[Operation], sizes: Mapping[int, int], kept: Iterable[int]) -> int:
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


def _crossing(operations: Sequence[Operation], sizes: Mapping[int, int], kept: Iterable[int]) -> list[int]:
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
