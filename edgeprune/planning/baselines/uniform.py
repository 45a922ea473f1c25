"""Evenly spaced blocks go. Distilled as BK-SDM is."""

from __future__ import annotations

from edgeprune.planning.baselines import Baseline, Blocks


def choose(blocks: Blocks, number: int) -> list[int]:
    """The middle one of each of so many equal stretches."""
    stretch = len(blocks.removable) / max(1, number)
    return [blocks.removable[int((i + 0.5) * stretch)] for i in range(number)]


BASELINE = Baseline("uniform", choose)
