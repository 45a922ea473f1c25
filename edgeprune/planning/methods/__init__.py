"""The methods of `plan`: each decides which parts of a model are removed. One file per method. Torch-free.

A file of this folder holds one `METHOD`, whose `name` is what `--method` takes; a new method is one new file. There
are three kinds, by what a method knows:

- `Scored` methods are the project's own. They read contribution scores and choose parts (blocks and components).
- `Baseline` methods are published or simple alternatives to compare with. They choose n whole blocks without scores;
  make.py finds the smallest n that meets the budget. All get the same budget, training steps and data.
- `Listed` methods remove what the user lists.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeprune.analysis.contribution import Group, Key
from edgeprune.families import Config, Family

_DISTANCES = ("velocity",)
"""Metrics that measure a distance between outputs."""


@dataclass(frozen=True)
class Problem:
    """What a scored method chooses from."""

    metric: str
    losses: dict[Key, float]
    """Mean drop of the score without each removable part."""
    joint: dict[Group, float]
    """Mean drop of the score without several removable parts at once, where that was measured."""
    left: Callable[[list[Key]], float]
    """The budgeted quantity (parameters or bytes) without these parts. Do not list components of a removed block."""
    limit: float
    """The budget: the most that `left` may return."""
    blocks: int
    """Number of blocks in the model. At least one must stay."""
    parameters: Callable[[list[Key]], float]
    """Number of parameters without these parts."""
    block_floor: float
    """`hybrid` removes no whole block that would leave fewer parameters than this; it removes components instead."""

    def cost(self, loss: float) -> float:
        """Return a loss on the scale on which losses add up; a gain stays negative.

        Independent errors add up in squares, so this is the signed square for a metric that is a distance between
        outputs, and the loss itself for every other metric.
        """
        return loss * abs(loss) if self.metric in _DISTANCES else loss

    def met(self, removed: list[Key]) -> bool:
        """Return whether the model without these parts meets the budget."""
        return self.left(removed) <= self.limit


@dataclass(frozen=True)
class Scored:
    """A method that chooses by contribution scores."""

    name: str
    choose: Callable[[Problem], list[Key]]
    """Return the parts to remove. If nothing meets the budget, return all that may go, or raise BudgetError."""
    components: bool = False
    """Whether it also removes components of blocks that stay."""
    joint: bool = False
    """Whether it weighs how parts act together. Such a method cannot be rehearsed before there are scores."""


@dataclass(frozen=True)
class Blocks:
    """What a baseline may know of a model."""

    count: int
    """Number of all blocks."""
    removable: Sequence[int]
    """Indices of the blocks that may be removed, ascending."""
    magnitudes: Sequence[float]
    """Root mean square of each block's weights; empty unless the baseline asks for them."""
    seed: int


@dataclass(frozen=True)
class Baseline:
    """A method to compare with: which blocks it removes, and how its authors distil.

    Every baseline trains all weights alike. The three lambdas default to those of BK-SDM's training script
    (`kd_train.sh` in Nota-NetsPresso/BK-SDM).
    """

    name: str
    choose: Callable[[Blocks, int], list[int]]
    """Return this many of the removable blocks."""
    features: str = "blocks"
    """Which features distillation compares, in addition to the velocity; see Recipe in training/recipe.py."""
    lambda_task: float = 1.0
    """Weight of the error to the data's velocity."""
    lambda_output: float = 1.0
    """Weight of the error to the teacher's velocity."""
    lambda_feature: float = 1.0
    """Weight of the error to the teacher's features, summed over blocks."""
    magnitudes: bool = False
    """Whether it reads the blocks' magnitudes."""
    drawn: bool = False
    """Whether the seed changes which blocks are removed."""


@dataclass(frozen=True)
class Listed:
    """A method that removes what the user lists; it takes no budget."""

    name: str
    choose: Callable[[Family, Config, str, str], list[Key]]
    """Return the parts that the texts of `--blocks` and `--components` list."""


Method = Scored | Baseline | Listed


@functools.cache
def methods() -> dict[str, Method]:
    """Return all methods by name: first the project's own, then the baselines, each in alphabetical order."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found: list[Method] = [module.METHOD for module in modules]
    return {method.name: method for method in sorted(found, key=lambda m: (isinstance(m, Baseline), m.name))}


def baselines() -> dict[str, Baseline]:
    """Return the baselines by name."""
    return {name: method for name, method in methods().items() if isinstance(method, Baseline)}
