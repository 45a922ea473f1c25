"""Blocks go by lot, another lot for each seed. Distilled as BK-SDM is."""

from __future__ import annotations

import numpy as np

from edgeprune.planning.baselines import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """The first ones of a permutation."""
    return [int(b) for b in np.random.default_rng(blocks.seed).permutation(list(blocks.removable))[:number]]


BASELINE = Baseline("random", choose, drawn=True)
