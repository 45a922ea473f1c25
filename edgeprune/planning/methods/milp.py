"""MILP: the best choice under the budget by integer programming, over measured losses of parts and of pairs of parts.

Removing a set costs the sum of its parts' costs and of its pairs' interactions, cost(both) - cost(one) - cost(other).
A pair that was not measured counts as having no interaction. Saved bytes (or parameters) add up over parts. HiGHS
solves the program through scipy, with the products of pairs made linear.

The choice is exact over the pairs in the program: the strongest gains, and every pair that a choice has contained. With
thousands of pairs at once the solver proves nothing in minutes. It does not see weak gains of pairs that no choice has
contained, nor interactions of three or more parts.
"""

from __future__ import annotations

from edgeprune.analysis.contribution import Key
from edgeprune.common.errors import BudgetError, EdgepruneError
from edgeprune.planning.methods import Problem, Scored

TIME_LIMIT_S = 120.0
GAP = 0.01
"""A choice counts as exact when no other can be better by more than this share."""
GAINS = 100
"""Number of pairs, of those that cost less together than apart, that are in the program from the start."""
_ROUNDS = 10

Pairs = dict[tuple[int, int], float]
"""Interaction of two parts by their indices in the list of parts."""


def choose(problem: Problem) -> list[Key]:
    """Return the parts of least cost whose removal meets the budget.

    Raises:
        BudgetError: no choice meets it.
        EdgepruneError: the solver ran out of time before it could prove that its choice is the best.
    """
    need = problem.left([]) - problem.limit
    for _ in range(_ROUNDS):
        removed = _solve(problem, need)
        excess = problem.left(removed) - problem.limit
        if excess <= 0:
            return removed
        # A part can save less in a set than alone, for example if the last block's context is already removed.
        need += excess
    raise BudgetError(f"no choice of --method milp meets the budget in {_ROUNDS} attempts; use --method hybrid")


def _solve(problem: Problem, need: float) -> list[Key]:
    """Return the parts of least cost that together save `need`, if savings add up.

    The program starts with the strongest gains. When a choice contains two parts whose interaction is not in the
    program, that interaction joins and the program is solved again. A missing positive interaction makes a choice look
    too cheap, so a choice that misses none is the best of all, apart from missing gains.
    """
    full = problem.left([])
    saved = {part: full - problem.left([part]) for part in problem.losses}
    parts = [part for part in problem.losses if saved[part] > 0]
    if not parts:
        if need <= 0:
            return []
        raise BudgetError("--method milp: no part is removable; lower --protect-first or --protect-last")
    index = {part: i for i, part in enumerate(parts)}
    costs = [problem.cost(problem.losses[part]) for part in parts]
    interactions: Pairs = {}
    for group, loss in problem.joint.items():
        if len(group) == 2 and set(group) <= index.keys():
            i, j = sorted(index[part] for part in group)
            interactions[i, j] = problem.cost(loss) - costs[i] - costs[j]
    gains = sorted((pair for pair in interactions if interactions[pair] < 0), key=interactions.__getitem__)
    included = set(gains[:GAINS])
    while True:
        pairs = {pair: interactions[pair] for pair in interactions if pair in included}
        chosen = _solve_program(problem, need, parts, saved, costs, pairs)
        missing = {pair for pair in interactions if set(pair) <= set(chosen)} - included
        if not missing:
            return [parts[i] for i in chosen]
        included |= missing


def _solve_program(
    problem: Problem, need: float, parts: list[Key], saved: dict[Key, float], costs: list[float], pairs: Pairs
) -> list[int]:
    """Return the indices of the chosen parts, given these interactions only."""
    import numpy as np  # here, so that listing the methods stays cheap
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    rows = _constraints(problem, need, parts, saved, pairs)
    entries = [(r, column, value) for r, (row, _) in enumerate(rows) for column, value in row.items()]
    r, c, v = (np.array(column) for column in zip(*entries, strict=True))
    count = len(parts) + len(pairs)
    solution = milp(
        np.array([*costs, *pairs.values()]),
        constraints=LinearConstraint(coo_array((v, (r, c)), shape=(len(rows), count)), lb=[low for _, low in rows]),
        integrality=np.arange(count) < len(parts),
        bounds=Bounds(0, 1),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
    )
    if solution.status == 2:
        raise BudgetError("--method milp cannot meet the budget, even if all that may go is removed; allow more")
    if solution.status != 0:
        raise EdgepruneError(f"--method milp: no best choice proven in {TIME_LIMIT_S:.0f} s; use --method hybrid")
    return [i for i in range(len(parts)) if solution.x[i] > 0.5]


def _constraints(
    problem: Problem, need: float, parts: list[Key], saved: dict[Key, float], pairs: Pairs
) -> list[tuple[dict[int, float], float]]:
    """Return rows of coefficients by variable and the least value of their sum.

    Variables are the parts (1 where removed), then the pairs (1 where both are).
    """
    full, index = problem.left([]), {part: i for i, part in enumerate(parts)}
    rows: list[tuple[dict[int, float], float]] = []
    rows.append(({index[p]: saved[p] / full for p in parts}, need / full))
    rows.append(({index[p]: -1.0 for p in parts if p[1] is None}, 1.0 - problem.blocks))
    rows += [({index[p]: -1.0, index[p[0], None]: -1.0}, -1.0) for p in parts if p[1] and (p[0], None) in index]
    for variable, ((i, j), interaction) in enumerate(pairs.items(), start=len(parts)):
        if interaction > 0:
            rows.append(({variable: 1.0, i: -1.0, j: -1.0}, -1.0))
        else:
            rows += [({part: 1.0, variable: -1.0}, 0.0) for part in (i, j)]
    return rows


METHOD = Scored(name="milp", choose=choose, components=True, joint=True)
