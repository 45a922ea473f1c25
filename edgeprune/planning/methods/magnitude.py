"""Removes the blocks with the smallest weights. Distilled like BK-SDM."""

from __future__ import annotations

from edgeprune.planning.methods import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Return the blocks whose weights have the smallest root mean square."""
    return sorted(blocks.removable, key=lambda b: (blocks.magnitudes[b], b))[:number]


METHOD = Baseline(name="magnitude", choose=choose, magnitudes=True)
