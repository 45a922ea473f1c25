"""HPP, the block pruning of HierarchicalPrune: removes the blocks that contribute least, among those that may go."""

from __future__ import annotations

from edgeprune.analysis.contribution import Key
from edgeprune.planning.methods import Problem, Scored


def choose(problem: Problem) -> list[Key]:
    """Remove blocks, the least contributing first, until the budget is met."""
    return least_contributing_blocks(problem)


def least_contributing_blocks(problem: Problem, least_parameters: float = 0.0) -> list[Key]:
    """Return the least contributing blocks, as few as meet the budget.

    Args:
        least_parameters: stop before fewer parameters than this would be left.
    """
    blocks = [part for part in problem.losses if part[1] is None]
    removed: list[Key] = []
    for part in sorted(blocks, key=lambda part: (problem.losses[part], part[0])):
        if problem.met(removed) or len(removed) + 1 == problem.blocks:
            break
        if problem.parameters([*removed, part]) < least_parameters:
            break
        removed.append(part)
    return removed


METHOD = Scored(name="hpp", choose=choose)
