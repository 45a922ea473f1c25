"""The blocks of the smallest weights go. Distilled as BK-SDM is."""

from __future__ import annotations

from edgeprune.planning.baselines import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Those of the least root mean square."""
    return sorted(blocks.removable, key=lambda b: (blocks.magnitudes[b], b))[:number]


BASELINE = Baseline("magnitude", choose, magnitudes=True)
