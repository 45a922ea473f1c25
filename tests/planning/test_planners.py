"""The method `milp` on problems with known answers, and end to end on a tiny model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from edgeprune.analysis.contribution import Key, group
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.planning.methods import Problem
from edgeprune.planning.methods.milp import GAP, choose
from edgeprune.planning.options import PlanOptions
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.workspace import Workspace

PARTS: list[Key] = [(b, "mlp") for b in range(6)]


def problem(seed: int, *, metric: str = "m", limit: float = 9.0) -> tuple[Problem, Any]:
    """Return six parts of 1 to 6 units, 21 in all, with random losses and interactions, and the true loss of a set."""
    draw = torch.Generator().manual_seed(seed)
    alone = (torch.rand(6, generator=draw) + 0.2).tolist()
    both = {(i, j): float(torch.randn(1, generator=draw)) * 0.3 for i, j in itertools.combinations(range(6), 2)}

    def loss(gone: list[Key]) -> float:
        places = sorted(b for b, _ in gone)
        pairs = sum(both[pair] for pair in itertools.combinations(places, 2))
        return sum(alone[i] for i in places) + pairs

    def left(gone: list[Key]) -> float:
        return 21.0 - sum(b + 1 for b, _ in gone)

    joint = {group([PARTS[i], PARTS[j]]): loss([PARTS[i], PARTS[j]]) for i, j in both}
    losses = {part: loss([part]) for part in PARTS}
    made = Problem(
        metric=metric, losses=losses, joint=joint, left=left, limit=limit, blocks=8, parameters=left, block_floor=0.0
    )
    return made, loss


@pytest.mark.parametrize("seed", range(8))
def test_milp_finds_the_best_of_all_choices(seed: int) -> None:
    given, loss = problem(seed)
    every = [list(s) for n in range(7) for s in itertools.combinations(PARTS, n)]
    best = min(loss(s) for s in every if given.left(s) <= given.limit)
    found = choose(given)
    assert given.left(found) <= given.limit
    assert loss(found) <= best + GAP * abs(best) + 1e-6


def test_distances_add_up_in_squares() -> None:
    given, _ = problem(0, metric="velocity")
    assert (given.cost(0.5), given.cost(-0.5)) == (0.25, -0.25)
    assert problem(0)[0].cost(0.5) == 0.5


def test_plans_of_a_folder(tmp_path: Path) -> None:
    """Analyze with joint removals and pairs, then plan."""
    tiny_pipeline(tmp_path / "tiny")
    ws = Workspace(tmp_path / "out", str(tmp_path / "tiny"), fresh=True)
    options = AnalyzeOptions(count=2, joint=True, pairs=True, estimator="gates")
    assert run_analyze(ws, options) and not run_analyze(ws, options)
    report = ws.report()
    assert report is not None and report.estimator == "gates" and len(report.joint()) > 100
    open_ends: dict[str, Any] = {"keep": 0.8, "protect_first": 0, "protect_last": 0}
    assert run_plan(ws, PlanOptions("milp", **open_ends))
    plan = ws.plan()
    assert plan.method == "milp" and plan.after.parameters <= 0.8 * plan.before.parameters
    with pytest.raises(InputError, match="omit --only-blocks"):
        run_analyze(ws, AnalyzeOptions(components=False, joint=True))


def test_milp_without_anything_that_may_go() -> None:
    given, _ = problem(0)
    nothing = Problem(**vars(given) | {"losses": {}, "joint": {}})
    with pytest.raises(BudgetError, match="no part is removable"):
        choose(nothing)
    assert choose(Problem(**vars(nothing) | {"limit": 21.0})) == []
