"""Removes evenly spaced blocks. Distilled like BK-SDM."""

from __future__ import annotations

from edgeprune.planning.methods import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Divide the removable blocks into this many equal stretches and return the middle block of each."""
    stretch = len(blocks.removable) / max(1, number)
    return [blocks.removable[int((i + 0.5) * stretch)] for i in range(number)]


METHOD = Baseline(name="uniform", choose=choose)
