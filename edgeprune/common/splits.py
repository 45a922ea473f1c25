"""Five disjoint splits of prompts and noise seeds, so that nothing is judged on what it was trained or tuned on.

A prompt belongs to the split of its meaning, so a paraphrase never crosses over. Each split owns a range of seeds, so
that even a prompt that a user gives for training and for evaluation gets different noise in the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum

from edgeprune.common.errors import InputError

SEEDS = 100_000_000
"""Seeds of each split: training owns 0 to 99,999,999, analysis the next hundred million, and so on."""


class Split(Enum):
    """What a prompt, and the noise that its image starts from, may be used for."""

    TRAINING = "training"
    """Distillation."""
    ANALYSIS = "analysis"
    """Contribution scores, which decide what is removed."""
    CALIBRATION = "calibration"
    """The modulation's mean and directions, and the scales of INT4."""
    TUNING = "tuning"
    """Choosing options, such as a learning rate, by a score."""
    HELD_OUT = "held-out"
    """Every figure that is reported: report, score, bench and compare."""

    def seed(self, number: int) -> int:
        """Return the seed of this split with a number from 0.

        Raises:
            InputError: the split has fewer seeds.
        """
        if not 0 <= number < SEEDS:
            raise InputError(f"seeds: found number {number:,} of {self.value}, expected at most {SEEDS - 1:,}")
        return list(Split).index(self) * SEEDS + number

    def seeds(self, count: int, first: int = 0) -> list[int]:
        """Return `count` seeds of this split, beginning with number `first`."""
        return [self.seed(first + i) for i in range(count)]


def fraction(key: str) -> float:
    """Return a number in 0..1 that depends on the text alone, evenly distributed over texts."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, shares: Mapping[Split, float]) -> Split:
    """Return the split that a meaning's key belongs to, whatever else there is.

    Args:
        key: the same text for all phrasings of a meaning.
        shares: expected share of the meanings in each split; they sum to 1.
    """
    left = fraction(key)
    for split, share in shares.items():
        left -= share
        if left < 0:
            return split
    return list(shares)[-1]
