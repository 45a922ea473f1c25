"""Cutting: where few bytes pass, nothing lost, nothing twice, and bounds that hold."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.common.pieces import Layout, Operation, Sizes, cuts, staying, working

MB = 10**6


def blocks(count: int, weights: int = 100) -> Sizes:
    """A chain of blocks of four operations, with 8 MB between blocks and 40 inside; weights in MB per block."""
    operations, values = list[Operation](), [8 * MB]
    for _ in range(count):
        first = len(values) - 1
        values += [40 * MB, 40 * MB, 40 * MB, 8 * MB]
        new = range(first + 1, first + 5)
        share = weights * MB // 4
        operations += [Operation(share, (new[i] - 1,), (new[i],)) for i in range(3)]
        operations.append(Operation(share, (new[2], first), (new[3],)))
    return Sizes(operations, values, inputs=(0,), outputs=(len(values) - 1,))


def test_cuts_are_between_blocks() -> None:
    sizes = blocks(5)
    assert cuts(sizes.operations, sizes.values, 130 * MB, sizes.outputs) == [range(i, i + 4) for i in range(0, 20, 4)]
    assert cuts(sizes.operations, sizes.values, 230 * MB, sizes.outputs) == [range(0, 8), range(8, 16), range(16, 20)]
    assert cuts(sizes.operations, sizes.values, 10**12, sizes.outputs) == [range(20)]
    alone = cuts(sizes.operations, sizes.values, 1, sizes.outputs)
    assert alone == [range(i, i + 1) for i in range(20)]  # an operation is never cut


def test_working_counts_what_is_alive() -> None:
    one = blocks(1)
    assert working(one.operations, one.values, one.outputs) == (8 + 40 + 40) * MB  # the input is read again at the end
    kept = [*one.outputs, 1]
    assert working(one.operations, one.values, kept) == (8 + 40 + 40 + 40) * MB


@given(st.integers(0, 10**6), st.integers(1, 400))
def test_every_graph_is_cut_whole(seed: int, most: int) -> None:
    draw = random.Random(seed)
    values, operations = [draw.randrange(1, 50)], list[Operation]()
    for _ in range(draw.randrange(1, 30)):
        reads = tuple(draw.sample(range(len(values)), draw.randrange(1, min(4, len(values) + 1))))
        values.append(draw.randrange(1, 50))
        operations.append(Operation(draw.randrange(0, 120), reads, (len(values) - 1,)))
    sizes = Sizes(operations, values, (0,), (len(values) - 1,))
    parts = cuts(operations, values, most, sizes.outputs)
    assert [index for part in parts for index in part] == list(range(len(operations)))
    for part in parts:
        assert len(part) == 1 or sum(operations[i].weights for i in part) <= most
    assert working(operations, values, sizes.outputs) <= sum(values)


def test_as_many_blocks_stay_as_fit() -> None:
    """More room never keeps fewer; at the least, none stays; with enough, all do and nothing is opened twice."""
    sizes = blocks(10, weights=150)
    needs = sizes.needs()
    assert needs.least < needs.whole
    least = sizes.layout(needs.least, rows=1)
    assert least.resident is None and len(least.parts) == 20  # of at most half of PIECE_BYTES
    kept = []
    for room in range(needs.least, needs.whole + 200 * MB, 50 * MB):
        layout = sizes.layout(room, rows=1)
        assert [i for part in layout.parts for i in part] == list(range(40))
        kept.append(0 if layout.resident is None else len(layout.parts[0]))
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 40
    assert len(set(kept)) > 4


def test_the_most_that_fit_stay() -> None:
    sums = [30, 50, 90]
    rooms = {-1: 0, 29: 0, 30: 1, 89: 2, 90: 3, 10**9: 3}
    assert {room: staying(3, lambda stay: sums[stay - 1], room) for room in rooms} == rooms
    assert staying(0, lambda stay: 0, 10) == 0


def test_pieces_halve_where_two_blocks_take_too_much() -> None:
    sizes = blocks(4)
    large, small = [range(0, 8), range(8, 16)], [range(i, i + 4) for i in range(0, 16, 4)]
    assert sizes.layout(sizes._streamed(large, rows=1), 1).parts[-1].stop == 16
    assert sizes.needs().least == sizes._streamed(small, rows=1) < sizes._streamed(large, rows=1)
    assert sizes.layout(sizes.needs().least, 1) == Layout(small, resident=None)
    assert sizes.layout(0, 1).parts == small


def test_rows_that_wait_take_room() -> None:
    sizes = blocks(10, weights=150)
    one, eight = (sizes.layout(sizes.needs().least + 600 * MB, rows) for rows in (1, 8))
    assert one.resident == 0 and len(one.parts[0]) > (0 if eight.resident is None else len(eight.parts[0]))


def test_a_lookup_is_a_piece_of_its_own() -> None:
    sizes = blocks(4)
    operations = [replace(one, alone=index in (0, 6)) for index, one in enumerate(sizes.operations)]
    for most in (1, 130 * MB, 10**12):
        parts = cuts(operations, sizes.values, most, sizes.outputs)
        assert [index for part in parts for index in part] == list(range(16))
        assert range(1) in parts and range(6, 7) in parts
    layout = Sizes(operations, sizes.values, (0,), sizes.outputs).layout(10**12, rows=1)
    assert layout.parts == [range(1), range(1, 6), range(6, 7), range(7, 16)] and layout.resident == 3
