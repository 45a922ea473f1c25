"""KOALA (arXiv 2312.04005) on an MMDiT: removes the last blocks.

Distillation compares velocity and the outputs of attention, and trains every weight. KOALA builds on BK-SDM: it changes
the features of the objective and publishes no training code (youngwanLEE/sdxl-koala lists it as to do). So the weights
of its losses are BK-SDM's.
"""

from __future__ import annotations

from edgeprune.planning.methods import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Return the last removable blocks."""
    return list(blocks.removable)[len(blocks.removable) - number :]


METHOD = Baseline(name="koala", choose=choose, features="attention")
