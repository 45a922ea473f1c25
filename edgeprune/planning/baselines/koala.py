"""KOALA (arXiv 2312.04005) on an MMDiT: the last blocks go, the outputs of attention are distilled.

Every weight is trained.
"""

from __future__ import annotations

from edgeprune.planning.baselines import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """The last ones."""
    return list(blocks.removable)[len(blocks.removable) - number :]


BASELINE = Baseline("koala", choose, features="attention")
