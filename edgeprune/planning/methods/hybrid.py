"""Hybrid: removes whole blocks as `hpp` does, up to a share of the parameters, then single components.

The share is `PlanOptions.threshold`; what projected modulation saves does not count towards it.

Components come from the removable blocks that stay, the one with the least loss per parameter first.
"""

from __future__ import annotations

from edgeprune.analysis.contribution import Key
from edgeprune.planning.methods import Problem, Scored
from edgeprune.planning.methods.hpp import least_contributing_blocks


def choose(problem: Problem) -> list[Key]:
    """Remove blocks down to the floor, then components, until the budget is met."""
    blocks = least_contributing_blocks(problem, problem.block_floor)
    return [*blocks, *_components(problem, blocks)]


def _components(problem: Problem, blocks: list[Key]) -> list[Key]:
    """Return components of the remaining blocks, the least loss per parameter first, until the budget is met."""
    remaining = problem.parameters(blocks)
    ranked = []
    for (block, component), loss in problem.losses.items():
        if component is not None and (block, None) not in blocks:
            saved = remaining - problem.parameters([*blocks, (block, component)])
            if saved > 0:
                ranked.append((max(loss, 0.0) / saved, -saved, block, component))
    components: list[Key] = []
    for *_, block, component in sorted(ranked):
        if problem.met([*blocks, *components]):
            break
        components.append((block, component))
    return components


METHOD = Scored(name="hybrid", choose=choose, components=True)
