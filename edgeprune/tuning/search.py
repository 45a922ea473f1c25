"""What to try, in an order that needs few trials, and what it costs. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgeprune.common.errors import InputError
from edgeprune.runtimes.base import Settings, noise_levels
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.sampling.solvers import EULER

SOLVERS = ("ab2", "unipc", "dpmpp_2m")
"""Those whose steps cost as much as Euler's."""
GUIDED_FROM = (0.0, 0.5, 0.25, 0.75)
"""Lowest noise levels at which guidance acts."""
LEAST_STEPS = 4
DISTILLED_STEPS = 8
"""Unguided models of so few steps of Euler were trained for these steps."""
EXACT_SOLVER, EXACT_STEPS = "unipc", 50
"""What counts as the exact solution: at least so many steps, twice the folder's own if that is more."""


@dataclass(frozen=True)
class Costs:
    """What settings cost on a folder."""

    settings: Settings
    scheduler: FlowMatch

    @property
    def guided(self) -> bool:
        """Whether guidance takes a second evaluation."""
        return self.settings.family.guided(self.settings.config, self.settings.generation.guidance_scale)

    def evaluations(self, generation: Generation) -> int:
        """Return the evaluations of the transformer that an image takes."""
        levels = noise_levels(self.scheduler, self.settings, generation)[:-1].tolist()
        return sum(1 + (self.guided and generation.guides(level)) for level in levels)


def check(own: Generation, *, guided: bool) -> None:
    """Refuse a model that has nothing to tune.

    Raises:
        InputError: it was distilled for few steps, or takes no more than the fewest.
    """
    steps = own.num_inference_steps
    if steps <= LEAST_STEPS or (steps <= DISTILLED_STEPS and own.solver == EULER and not guided):
        raise InputError(
            f"tune: found {steps} steps of {own.solver}{'' if guided else ' without guidance'}: these are so few that "
            "the model was trained for them, which other solvers do not shorten; tune models of more steps"
        )


def exact(own: Generation) -> Generation:
    """Return settings that solve the flow's equation to the end, with the folder's own guidance."""
    return replace(own, num_inference_steps=max(EXACT_STEPS, 2 * own.num_inference_steps), solver=EXACT_SOLVER)


def lines(own: Generation, *, guided: bool) -> Iterator[Generation]:
    """Yield a solver with a range of guidance, the range of the folder first; steps are the folder's own."""
    low, high = own.guidance_range
    for start in GUIDED_FROM if guided else (0.0,):
        if start and not low < start < high:
            continue
        for solver in SOLVERS:
            yield replace(own, solver=solver, guidance_range=(max(low, start), high))


def fewest(
    own: Generation, *, guided: bool, cost: Callable[[Generation], int], good: Callable[[Generation], bool]
) -> Generation:
    """Return the good settings with the fewest evaluations; the folder's own where nothing cheaper is good.

    In a line, more steps are taken to be better. So of each, the dearest that is cheaper than the best so far is tried
    first: where that is not good, the rest of the line is not either; where it is, the fewest steps are bisected.

    Args:
        own: the folder's settings.
        guided: whether guidance takes a second evaluation.
        cost: evaluations of an image.
        good: draws and scores.
    """
    best = own
    for line in lines(own, guided=guided):
        steps = range(LEAST_STEPS, own.num_inference_steps + 1)
        ladder = [one for n in steps if cost(one := replace(line, num_inference_steps=n)) < cost(best)]
        if not ladder or not good(ladder[-1]):
            continue
        first, last = 0, len(ladder) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if good(ladder[middle]) else (middle + 1, last)
        best = ladder[last]
    return best
