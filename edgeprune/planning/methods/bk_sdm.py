"""BK-SDM (arXiv 2305.15798) on an MMDiT: removes blocks by a fixed pattern of positions, without scores.

In the U-Net, each stage keeps the first of two equal layers, and the innermost stages go if that is not enough. An
MMDiT has no stages. Here blocks form pairs: first the second block of each pair goes, from the middle of the model
outwards, then the first block of each pair, in the same order.
Distillation compares velocity and block outputs, and trains every weight. Task, output and feature loss weigh the same,
as in the authors' training script.
"""

from __future__ import annotations

from edgeprune.planning.methods import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Return second blocks of pairs before first ones, each from the middle outwards."""
    middle = (blocks.count - 1) / 2
    return sorted(blocks.removable, key=lambda b: (b % 2 == 0, abs(b - middle), b))[:number]


METHOD = Baseline(name="bk-sdm", choose=choose)
