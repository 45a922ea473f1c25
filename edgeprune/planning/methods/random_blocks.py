"""`random`: removes randomly chosen blocks; each seed draws a different set. Distilled like BK-SDM.

The file is not called random.py because that is a module of the standard library.
"""

from __future__ import annotations

from edgeprune.planning.methods import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """Return the first blocks of a seeded permutation."""
    import numpy as np  # here, so that listing the methods stays cheap

    return [int(b) for b in np.random.default_rng(blocks.seed).permutation(list(blocks.removable))[:number]]


METHOD = Baseline(name="random", choose=choose, drawn=True)
