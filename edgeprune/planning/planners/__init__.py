"""Methods of `plan` that know how parts act together; each a file of its own. Torch-free.

A planner is a function `choose` from a `Problem` to the parts that go. Losses add up in squares where the metric is a
distance between outputs (independent errors do), and as they are for every other metric. A new one is one new file,
listed in `PLANNERS`. What it leaves out: `hpp`, `hybrid` and `manual` (plan.py), which know no interactions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeprune.analysis.contribution import Group, Key

PLANNERS = ("milp",)
_DISTANCES = ("velocity",)


@dataclass(frozen=True)
class Measured:
    """What a method may ask of a model, where there is one."""

    magnitudes: Sequence[float] = ()
    """Root mean square of each block's weights."""


@dataclass(frozen=True)
class Problem:
    """What a planner chooses from."""

    metric: str
    losses: dict[Key, float]
    """Mean drop of the score without each part that may go."""
    joint: dict[Group, float]
    """The same without several parts at once, where that was measured."""
    left: Callable[[list[Key]], float]
    """Parameters or bytes without these parts; those of a removed block need not be listed."""
    limit: float
    """How much may be left."""
    blocks: int

    def cost(self, loss: float) -> float:
        """A loss on the scale on which losses add up; a gain stays a gain."""
        return loss * abs(loss) if self.metric in _DISTANCES else loss


def planner_named(name: str) -> Callable[[Problem], list[Key]]:
    """The function of a planner."""
    found: Callable[[Problem], list[Key]] = importlib.import_module(f"{__name__}.{name}").choose
    return found
