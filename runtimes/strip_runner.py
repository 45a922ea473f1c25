"""Runs a network in strips of rows within a number of bytes; see strips.py for why the result is that of the whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeprune.common import heap
from edgeprune.common.files import need_space
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.strip_norms import Moments
from edgeprune.runtimes.strip_store import Store
from edgeprune.runtimes.strips import Plan, Segment, fewest, windows

PACKING = 2
"""Most copies of a segment's weights, as opened: one is made while the last one is read."""


class Opened(Protocol):
    """A segment that was opened for strips of one height."""

    def __call__(self, values: Mapping[int, Array], affine: Mapping[int, tuple[Array, Array]]) -> Mapping[int, Array]:
        """Return the values that the segment makes; they may be overwritten by the next call.

        Args:
            values: what it reads, by value.
            affine: (a, b), (C) each, by norm layer.
        """
        ...

    def close(self) -> None:
        """Release weights and memory."""
        ...


ENOUGH = 300_000_000
"""Most bytes of a strip. Larger ones save no time: fewer rows are computed twice, but fresh memory has to be zeroed.

SD3.5's decoder took 138 s of processor time at 1024x1024 with strips of 89 MB, and 134 s with 300 MB.
"""

Open = Callable[[int, int], Opened]
"""Opens the segment of this place for strips of so many rows."""


def least_bytes(plan: Plan) -> int:
    """Return the bytes that the smallest strips take, beyond what the process has without them."""
    return _outside(plan) + max(_bytes(plan, segment, fewest(segment)) for segment in plan.segments)


def _outside(plan: Plan) -> int:
    """Return the bytes of what is in memory all the time: what the network reads and returns."""
    return plan.rows[plan.network.source].size + plan.rows[plan.network.result].size


def _bytes(plan: Plan, segment: Segment, rows: int) -> int:
    return plan.bytes_of(segment, rows) + PACKING * plan.weights_of(segment)


def heights(plan: Plan, budget: int) -> list[int]:
    """Return the most rows of a strip of each segment within a number of bytes; at least `fewest`."""
    free = min(budget - _outside(plan), ENOUGH)
    out = []
    for segment in plan.segments:
        low, high = fewest(segment), segment.rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _bytes(plan, segment, middle) <= free else (low, middle - 1)
        out.append(low)
    return out


def run(plan: Plan, source: Array, result: Array, budget: int, opening: Open) -> None:
    """Write what a network makes of `source` into `result`; both have the shapes of the plan.

    Args:
        plan: its segments.
        source: the input.
        result: the output, contiguous.
        budget: bytes beyond what the process has without `source` and `result`; if it is smaller than `least_bytes`,
            the smallest strips are taken.
        opening: opens a segment.

    Raises:
        DiskError: the disk has no room for what passes from segment to segment.
    """
    network = plan.network
    need_space(Path(tempfile.gettempdir()), plan.most_stored())
    normed = {plan.norm_source(i) for segment in plan.segments for i in segment.norms}
    moments = {value: Moments(plan.rows[value].outer) for value in normed}
    if network.source in normed:
        moments[network.source].add(source[0])
    last = plan.last_reads()
    with heap.returned(), Store() as store:
        store.hold(network.source, source)
        store.hold(network.result, result)
        for index, (segment, rows) in enumerate(zip(plan.segments, heights(plan, budget), strict=True)):
            _run(plan, index, rows, store, moments, opening)
            for value in {*segment.strips, *segment.whole}:
                if last[value] == index:
                    store.drop(value)


def _run(plan: Plan, index: int, rows: int, store: Store, moments: Mapping[int, Moments], opening: Open) -> None:
    """Run a segment on strips of at most so many rows."""
    segment = plan.segments[index]
    strips = windows(segment.rows, segment.halo, rows)
    height = strips[0].stop - strips[0].start
    affine = {}
    for layer in segment.norms:
        norm = plan.network.layers[layer].norm
        assert norm is not None
        affine[layer] = moments[plan.norm_source(layer)].affine(norm)
    opened = opening(index, height)
    try:
        values = {
            value: np.empty(plan.strip_shape(value, segment, height), np.float32)
            for value in (*segment.strips, *segment.whole)
        }
        for value in segment.whole:
            lies = plan.rows[value]
            store.read(value, lies, 0, values[value].reshape(lies.outer, lies.count, lies.inner))
        for value in segment.makes:
            store.create(value)
        for strip in strips:
            for value in segment.strips:
                lies = plan.rows[value]
                store.read(value, lies, strip.start, values[value].reshape(lies.outer, height, lies.inner))
            for value, array in opened(values, affine).items():
                lies = plan.rows[value]
                scale = lies.count // segment.rows
                made = array.reshape(lies.outer, height * scale, lies.inner)
                kept = made[:, (strip.first - strip.start) * scale : (strip.last - strip.start) * scale]
                store.write(value, lies, strip.first * scale, kept)
                if value in moments:
                    moments[value].add(kept)
    finally:
        opened.close()
