"""BK-SDM (arXiv 2305.15798) on an MMDiT: blocks go by a pattern of positions, without scores.

In the U-Net each stage keeps the first of two equal layers, and the innermost stages go where that is not enough. An
MMDiT has no stages: blocks are taken in pairs, whose second one goes, from the middle outwards; then the first ones.
Velocity and block outputs are distilled, every weight is trained.
"""

from __future__ import annotations

from edgeprune.planning.baselines import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Second ones of pairs before first ones, each from the middle outwards."""
    middle = (blocks.count - 1) / 2
    return sorted(blocks.removable, key=lambda b: (b % 2 == 0, abs(b - middle), b))[:number]


BASELINE = Baseline("bk-sdm", choose)
