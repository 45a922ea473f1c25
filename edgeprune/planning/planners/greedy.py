"""One part after the other, the least loss for what it saves first, scored again on the model as it then is.

A candidate is scored again only when it comes first by its last known loss (Minoux's accelerated greedy), so that a
removal takes a few evaluations instead of one for every part that is left. Exact where losses never fall as others go.
"""

from __future__ import annotations

import heapq

from edgeprune.analysis.contribution import Key
from edgeprune.common.errors import InputError
from edgeprune.planning.planners import Problem


def choose(problem: Problem) -> list[Key]:
    """Parts until no more need go, or none is left that may.

    Raises:
        InputError: there is no model to score.
    """
    loss = problem.measured.loss
    if loss is None:
        raise InputError("--method greedy scores the model again and again: give -o (a folder), not --config")
    gone: list[Key] = []
    cost, left, removals = 0.0, problem.left([]), 0
    heap = []
    for order, (part, alone) in enumerate(problem.losses.items()):
        saved = left - problem.left([part])
        if saved > 0:
            heap.append((problem.cost(alone) / saved, order, part, 0, problem.cost(alone)))
    heapq.heapify(heap)
    while left > problem.limit and heap:
        _, order, part, known, total = heapq.heappop(heap)
        if (part[0], None) in gone or _is_last_block(problem, gone, part):
            continue
        candidate = [p for p in gone if part[1] is not None or p[0] != part[0]] + [part]
        if known < removals:
            saved = left - problem.left(candidate)
            if saved > 0:
                total = problem.cost(loss(candidate))
                heapq.heappush(heap, ((total - cost) / saved, order, part, removals, total))
            continue
        # A block takes the place of its components: the list may get shorter, the count of removals never does.
        gone, cost, left, removals = candidate, total, problem.left(candidate), removals + 1
    return gone


def _is_last_block(problem: Problem, gone: list[Key], part: Key) -> bool:
    return part[1] is None and sum(component is None for _, component in gone) + 1 == problem.blocks
