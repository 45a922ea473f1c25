"""Planners on problems with known answers, and end to end on a tiny model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_of, tiny_inputs, tiny_pipeline, tiny_transformer

from edgeprune.analysis.contribution import ContributionReport, Key, fingerprint, group
from edgeprune.analysis.timing import step_seconds
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.families import family_of
from edgeprune.planning.plan import make_plan
from edgeprune.planning.planners import Measured, Problem, planner_named
from edgeprune.planning.planners.milp import GAP
from edgeprune.stages import pipeline
from edgeprune.stages.pipeline import AnalyzeOptions, PlanOptions, Workspace

PARTS: list[Key] = [(b, "mlp") for b in range(6)]


def problem(seed: int, *, metric: str = "m", limit: float = 9.0, **more: Any) -> tuple[Problem, Any]:
    """Six parts of 1 to 6 units of 21 with random losses and interactions, and the true loss of a set."""
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
    return Problem(metric, losses, joint, left, limit, 8, Measured(loss), **more), loss


@pytest.mark.parametrize("seed", range(8))
def test_milp_finds_the_best_of_all_choices(seed: int) -> None:
    given, loss = problem(seed)
    every = [list(s) for n in range(7) for s in itertools.combinations(PARTS, n)]
    best = min(loss(s) for s in every if given.left(s) <= given.limit)
    found = planner_named("milp")(given)
    assert given.left(found) <= given.limit
    assert loss(found) <= best + GAP * abs(best) + 1e-6


def test_milp_keeps_a_latency_budget_too() -> None:
    given, loss = problem(1, save_s=3.0)
    seconds: dict[Key, float] = {part: (3.0 if part == (0, "mlp") else 0.5) for part in PARTS}
    given = Problem(**vars(given) | {"measured": Measured(loss, seconds, 10.0)})
    every = [list(s) for n in range(7) for s in itertools.combinations(PARTS, n)]
    allowed = [s for s in every if given.left(s) <= given.limit and sum(seconds[p] for p in s) >= 3.0]
    found = planner_named("milp")(given)
    assert found in allowed or sorted(found) in allowed
    assert loss(found) <= min(map(loss, allowed)) + GAP
    slow = Problem(**vars(given) | {"measured": Measured(loss, dict.fromkeys(PARTS, 0.1), 10.0)})
    with pytest.raises(BudgetError, match="cannot be met"):
        planner_named("milp")(slow)


def test_distances_add_up_in_squares() -> None:
    given, _ = problem(0, metric="velocity")
    assert (given.cost(0.5), given.cost(-0.5)) == (0.25, -0.25)
    assert problem(0)[0].cost(0.5) == 0.5


def test_greedy_scores_again_what_comes_first() -> None:
    """The second of twins costs nothing alone and much beside the first: known only from scoring again."""
    asked: list[list[Key]] = []

    def loss(gone: list[Key]) -> float:
        asked.append(gone)
        both = {(0, "mlp"), (1, "mlp")} <= set(gone)
        return sum({0: 0.1, 1: 0.2, 2: 0.5, 3: 0.9}[b] for b, _ in gone) + 5.0 * both

    parts: list[Key] = [(b, "mlp") for b in range(4)]
    losses = {part: loss([part]) for part in parts}
    asked.clear()
    given = Problem("m", losses, {}, lambda gone: 4.0 - len(gone), 2.0, 8, Measured(loss))
    assert planner_named("greedy")(given) == [(0, "mlp"), (2, "mlp")]
    assert asked == [[(0, "mlp"), (1, "mlp")], [(0, "mlp"), (2, "mlp")]], "the fourth is never asked again"
    with pytest.raises(InputError, match="give -o"):
        planner_named("greedy")(Problem("m", losses, {}, given.left, 2.0, 8, Measured()))


def test_greedy_takes_a_block_whose_components_went() -> None:
    def left(gone: list[Key]) -> float:
        blocks = {b for b, c in gone if c is None}
        return 8.0 - 4 * len(blocks) - sum(2 for b, c in gone if c and b not in blocks)

    losses: dict[Key, float] = {(0, "mlp"): 0.1, (0, None): 1.0, (1, None): 0.9}
    found = planner_named("greedy")(
        Problem("m", losses, {}, left, 4.0, 2, Measured(lambda gone: 1.0 if (0, None) in gone else 9.0))
    )
    assert found == [(0, None)], "the component is not listed beside its block"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "hpp", "max_latency": 0.5}, "with milp"),
        ({"method": "milp", "max_latency": 1.5}, "expected 0 to 1"),
        ({"method": "milp", "max_latency": 0.5}, "give -o"),
        ({"method": "greedy"}, "give -o"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    model = tiny_transformer(num_layers=4)
    config = config_of(model)
    family = family_of(config)
    drops = {((b, c),): [-0.1 * (b + 1)] for b in range(4) for c in (None, "mlp")}
    report = ContributionReport(fingerprint(config), family.name, 4, "m", ["p"], [0.0], drops)
    with pytest.raises(InputError, match=words):
        make_plan(family, config, report, keep=0.9, protect_first=0, **options)


def test_seconds_of_parts() -> None:
    model = tiny_transformer(num_layers=3)
    family = family_of(config_of(model))
    ticks = iter(float(i) for i in range(10_000))
    runs = [0]

    def clock() -> float:
        return next(ticks) + runs[0]

    def step() -> None:
        """As many ticks as whole blocks are there."""
        model(**tiny_inputs())
        runs[0] += sum(type(b).__name__ != "PassThrough" for b in model.transformer_blocks)

    whole, saved = step_seconds(family, model, step, [(1, None), (1, "mlp")], torch.zeros(64), clock=clock)
    assert (whole, saved) == (4.0, {(1, None): 1.0, (1, "mlp"): 0.0})


def test_plans_of_a_folder(tmp_path: Path) -> None:
    """analyze with joint removals and pairs, then both planners, then a latency budget."""
    tiny_pipeline(tmp_path / "tiny")
    ws = Workspace(tmp_path / "out", str(tmp_path / "tiny"), fresh=True)
    options = AnalyzeOptions(count=2, joint=True, pairs=True, estimator="gates")
    assert pipeline.run_analyze(ws, options) and not pipeline.run_analyze(ws, options)
    report = ws.report()
    assert report is not None and report.estimator == "gates" and len(report.joint()) > 100
    open_ends = {"keep": 0.8, "protect_first": 0, "protect_last": 0}
    for given in ({"method": "greedy"}, {"method": "milp"}, {"method": "milp", "max_latency": 0.99}):
        assert pipeline.run_plan(ws, PlanOptions(**open_ends, **given))
        plan = ws.plan()
        assert plan.method == given["method"] and plan.after.parameters <= 0.8 * plan.before.parameters
    with pytest.raises(InputError, match="leave --only-blocks out"):
        pipeline.run_analyze(ws, AnalyzeOptions(components=False, joint=True))


def test_greedy_scores_again_after_a_block_took_its_components() -> None:
    """The list of what is gone gets shorter then; what was scored before it is stale nevertheless."""
    sizes: dict[Key, float] = {(0, "a"): 1, (0, "b"): 1, (0, None): 3, (1, "a"): 1, (2, "a"): 1}
    alone: dict[Key, float] = {(0, "a"): 0.01, (0, "b"): 0.01, (0, None): 0.1, (1, "a"): 0.05, (2, "a"): 0.2}
    scored: list[list[Key]] = []

    def loss(gone: list[Key]) -> float:
        scored.append(gone)
        dearer = 0.0 if (1, "a") not in gone else 5.0 if (0, None) in gone else 0.05 if (0, "a") in gone else 0.0
        return sum(alone[p] for p in gone) + dearer

    def left(gone: list[Key]) -> float:
        return 10 - sum(sizes[p] for p in gone)

    given = Problem("m", alone, {}, left, 6.0, 4, Measured(loss))
    # Block 0 makes (1, "a") dear, which only a new score can tell.
    assert planner_named("greedy")(given) == [(0, None), (2, "a")]
    assert [(0, None), (1, "a")] in scored


def test_milp_without_anything_that_may_go() -> None:
    given, _ = problem(0)
    nothing = Problem(**vars(given) | {"losses": {}, "joint": {}})
    with pytest.raises(BudgetError, match="nothing may go"):
        planner_named("milp")(nothing)
    assert planner_named("milp")(Problem(**vars(nothing) | {"limit": 21.0})) == []
