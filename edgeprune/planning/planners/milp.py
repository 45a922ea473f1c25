"""The best choice under the budgets by integer programming, over measured losses of parts and of pairs of parts.

Removing a set costs the sum of its parts' costs and of its pairs' interactions, cost(both) - cost(one) - cost(other);
pairs that were not measured are taken to have none. Bytes (or parameters) saved add up over parts. Solved
by HiGHS through scipy, the products of pairs made linear. The choice is exact over the pairs in the program: the
strongest gains, and every pair that a choice has met. With thousands at once the solver proves nothing in minutes.
What it leaves out: weak gains of pairs that no choice has met, and interactions of three and more.
"""

from __future__ import annotations

import numpy as np

from edgeprune.analysis.contribution import Key
from edgeprune.common.errors import BudgetError, EdgepruneError
from edgeprune.planning.planners import Problem

TIME_LIMIT_S = 120.0
GAP = 0.01
"""A choice counts as exact when none can be better by more than this share."""
GAINS = 100
"""Pairs that cost less together than apart which are in the program from the start."""
_ROUNDS = 10


def choose(problem: Problem) -> list[Key]:
    """The parts of least cost whose removal meets the budgets.

    Raises:
        BudgetError: no choice does.
        EdgepruneError: the solver ran out of time before it could tell that its choice is the best.
    """
    need = problem.left([]) - problem.limit
    for _ in range(_ROUNDS):
        gone = _solve(problem, need)
        over = problem.left(gone) - problem.limit
        if over <= 0:
            return gone
        need += over  # a part can save less beside others than alone: the last block's context is gone anyway
    raise BudgetError(f"no choice of --method milp meets the budget in {_ROUNDS} attempts; use --method hybrid")


def _solve(problem: Problem, need: float) -> list[Key]:
    """The other interactions join when a choice has both parts: one above zero that is absent makes a choice too cheap,
    so a choice that lacks none is the best of all, but for gains that are absent."""
    whole = problem.left([])
    saved = {part: whole - problem.left([part]) for part in problem.losses}
    parts = [part for part in problem.losses if saved[part] > 0]
    if not parts:
        if need <= 0:
            return []
        raise BudgetError("--method milp: nothing may go; lower --protect-first or --protect-last")
    place = {part: i for i, part in enumerate(parts)}
    alone = [problem.cost(problem.losses[part]) for part in parts]
    both = {}
    for group, loss in problem.joint.items():
        if len(group) == 2 and set(group) <= place.keys():
            i, j = sorted(place[part] for part in group)
            both[i, j] = problem.cost(loss) - alone[i] - alone[j]
    known = set(sorted((pair for pair in both if both[pair] < 0), key=both.__getitem__)[:GAINS])
    while True:
        chosen = _solved(problem, need, parts, saved, alone, {pair: both[pair] for pair in both if pair in known})
        missing = {pair for pair in both if set(pair) <= set(chosen)} - known
        if not missing:
            return [parts[i] for i in chosen]
        known |= missing


def _solved(
    problem: Problem,
    need: float,
    parts: list[Key],
    saved: dict[Key, float],
    alone: list[float],
    both: dict[tuple[int, int], float],
) -> list[int]:
    """Places of the chosen parts, by these interactions alone."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    whole, place = problem.left([]), {part: i for i, part in enumerate(parts)}
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficient times variable is at least a number
    rows.append(({place[p]: saved[p] / whole for p in parts}, need / whole))
    rows.append(({place[p]: -1.0 for p in parts if p[1] is None}, 1.0 - problem.blocks))
    rows += [({place[p]: -1.0, place[p[0], None]: -1.0}, -1.0) for p in parts if p[1] and (p[0], None) in place]
    for index, ((i, j), interaction) in enumerate(both.items(), start=len(parts)):
        if interaction > 0:
            rows.append(({index: 1.0, i: -1.0, j: -1.0}, -1.0))
        else:
            rows += [({k: 1.0, index: -1.0}, 0.0) for k in (i, j)]
    entries = [(r, column, value) for r, (row, _) in enumerate(rows) for column, value in row.items()]
    r, c, v = (np.array(column) for column in zip(*entries, strict=True))
    count = len(parts) + len(both)
    found = milp(
        np.array([*alone, *both.values()]),
        constraints=LinearConstraint(coo_array((v, (r, c)), shape=(len(rows), count)), lb=[low for _, low in rows]),
        integrality=np.arange(count) < len(parts),
        bounds=Bounds(0, 1),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
    )
    if found.status == 2:
        raise BudgetError("the budgets cannot be met by --method milp, whatever goes of what may; allow more")
    if found.status != 0:
        raise EdgepruneError(f"--method milp: no best choice proven in {TIME_LIMIT_S:.0f} s; use --method hybrid")
    return [i for i in range(len(parts)) if found.x[i] > 0.5]
