"""Baselines: which blocks they remove, the budget, and how each is distilled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.common.errors import BudgetError, InputError
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import Blocks, baselines
from edgeprune.planning.options import METHODS
from edgeprune.stages.plan import block_magnitudes
from edgeprune.stages.workspace import Workspace

LARGE = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())["sd3.5-large"]
TEN = Blocks(10, range(10), [float(i % 4) for i in range(10)], 0)


def test_methods_are_found_by_their_files() -> None:
    ours = ("hpp", "hybrid", "manual", "milp")
    assert METHODS == (*ours, "bk-sdm", "koala", "magnitude", "random", "uniform") == (*ours, *baselines())


@pytest.mark.parametrize(
    ("name", "three"),
    [("bk-sdm", [5, 3, 7]), ("koala", [7, 8, 9]), ("uniform", [1, 5, 8]), ("magnitude", [0, 4, 8])],
)
def test_which_blocks_go(name: str, three: list[int]) -> None:
    assert baselines()[name].choose(TEN, 3) == three


@pytest.mark.parametrize("name", baselines())
@pytest.mark.parametrize("number", [0, 1, 4, 8])
def test_so_many_different_blocks_that_may_go(name: str, number: int) -> None:
    chosen = baselines()[name].choose(replace(TEN, removable=range(1, 9)), number)
    assert len(chosen) == len(set(chosen)) == number and set(chosen) <= set(range(1, 9))


def test_each_seed_draws_another_lot() -> None:
    draw = baselines()["random"].choose
    assert draw(TEN, 5) == draw(TEN, 5) != draw(replace(TEN, seed=1), 5)


@pytest.mark.parametrize("name", baselines())
def test_a_plan_is_the_smallest_that_meets_the_budget(name: str) -> None:
    family = family_of(LARGE)
    magnitudes = [1.0 + i for i in range(38)]
    plan = make_plan(family, LARGE, None, method=name, keep=0.79, magnitudes=magnitudes)
    assert len(plan.blocks) == 8 and plan.after.parameters == 6_352_630_080 and not plan.components
    assert max(plan.blocks) < 36  # the last two are protected, as for every method
    with pytest.raises(BudgetError, match=r"cannot be met.* [GM]B after INT4; allow more, .*--modulation-rank"):
        make_plan(family, LARGE, None, method=name, keep=0.01, magnitudes=magnitudes)


def test_magnitude_needs_weights() -> None:
    with pytest.raises(InputError, match="--method magnitude reads weights: give -o"):
        make_plan(family_of(LARGE), LARGE, None, method="magnitude", keep=0.79)


def test_magnitudes_of_the_built_in_model(tmp_path: Path) -> None:
    """Read tensor by tensor, they equal those of all weights of the block at once."""
    ws = Workspace(tmp_path / "out", None)
    found = block_magnitudes(ws)
    tensors = [p.double().flatten() for p in ws.pipe.transformer.transformer_blocks[3].parameters()]
    expected = (sum(float(t.square().sum()) for t in tensors) / sum(t.numel() for t in tensors)) ** 0.5
    assert len(found) == 14 and found[3] == pytest.approx(expected, rel=1e-3)
