"""The work of a training in evaluations of a block by one sample: equal work makes different trainings comparable.

A backward pass counts as two evaluations. A block counts once, whichever of its components were removed. Text encoders,
the VAE, stand-ins and the optimizer do not count.
"""

from __future__ import annotations

from edgeprune.common.errors import InputError
from edgeprune.planning.plan import PrunePlan
from edgeprune.training.recipe import DistillOptions, Recipe


def per_sample(plan: PrunePlan, recipe: Recipe, options: DistillOptions) -> int:
    """Return the evaluations that a step takes for each sample of its batch.

    From states, only blocks that are trained run. Otherwise the teacher runs, and what is frozen of the student.
    """
    frozen = plan.first_pruned if recipe.freeze_prefix else 0
    trained = 3 * (len(plan.kept) - frozen)
    return trained if recipe.states else _taught(plan, options) + frozen + trained


def of_states(plan: PrunePlan, recipe: Recipe, options: DistillOptions) -> int:
    """Return the evaluations that make all states: of the teacher, and of the frozen blocks where they are rounded."""
    frozen = plan.first_pruned if options.int4_group_size else 0
    return recipe.states * recipe.rounds * (_taught(plan, options) + frozen)


def _taught(plan: PrunePlan, options: DistillOptions) -> int:
    """Return the evaluations of the teacher: twice all blocks if the student learns its guided velocity."""
    return plan.num_blocks * (1 if options.guidance is None else 2)


def steps_in(work: int, plan: PrunePlan, recipe: Recipe, options: DistillOptions) -> int:
    """Return how many steps a training takes that does so much work.

    Args:
        work: evaluations of a block by one sample.
        plan: what is pruned.
        recipe: how it is distilled.
        options: of the training, for its batch and states.

    Raises:
        InputError: it does not suffice for a step.
    """
    states, step = of_states(plan, recipe, options), options.batch * per_sample(plan, recipe, options)
    if work < states + step:
        making = f"{states:,} for states and " if states else ""
        raise InputError(
            f"work: found {work:,} evaluations of a block, expected at least {making}{step:,} for a step; "
            "give more work, or a smaller batch"
        )
    return (work - states) // step
