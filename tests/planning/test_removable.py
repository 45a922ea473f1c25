"""What a plan may remove: protected blocks by kind, kept components, and blocks that lose every branch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import COSTLY_KINDS, KINDS, config_of, tiny_inputs, tiny_velocity

from edgeprune.analysis.contribution import ContributionReport, collapsed, fingerprint, parts, removed, swapped
from edgeprune.artefact.surgery import prune
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.families import Config, family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import baselines
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.removable import Removable

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
FLUX, MEDIUM, LARGE = (CONFIGS[name] for name in ("flux.1-dev", "sd3.5-medium", "sd3.5-large"))


def report(config: Config) -> ContributionReport:
    """Return a report in which later parts contribute less, and a block eight times as much as a component."""
    family = family_of(config)
    scores = {((b, c),): [-(1.0 if c else 8.0) / (1 + b)] for b, c in parts(family, config)}
    count = family.block_count(config)
    return ContributionReport(fingerprint(config), family.name, count, "m", ["p"], [0.0], scores)


def plan_of(config: Config, **options: Any) -> PrunePlan:
    return make_plan(family_of(config), config, report(config), **options)


def removable(config: Config, **options: Any) -> Removable:
    return Removable.of(family_of(config), config, PlanOptions(**options))


def test_the_published_plan_of_sd35_medium_is_among_the_candidates() -> None:
    """The defaults were chosen with the plan of SD3.5 Large Turbo; this one is a check of them."""
    candidates = removable(MEDIUM).blocks
    assert candidates == list(range(12, 22))
    assert {13, 15, 16, 18, 20, 21} <= set(candidates)


def test_by_default_flux_loses_single_stream_blocks_alone_and_says_so() -> None:
    family, usual = family_of(FLUX), removable(FLUX)
    assert usual.blocks == list(range(28, 55))
    text = usual.by_kind(family, FLUX)
    assert text.startswith("28 to 54 (0 of 19 joint, 27 of 38 single); --protect-first joint=N lets joint blocks")
    assert removable(LARGE).by_kind(family_of(LARGE), LARGE) == "19 to 35"


@pytest.mark.parametrize(
    ("first", "method", "expected"),
    [
        (28, "hpp", "28 to 54"),
        ({"joint": 10}, "hpp", "10 to 18, 28 to 54"),
        ({"joint": 10, "single": 5}, "milp", "10 to 18, 24 to 54"),
        ({"single": 0}, "hybrid", "19 to 54"),
        ({"joint": 19, "single": 35}, "hpp", "54"),
        (None, "koala", "0 to 54"),
        ({"joint": 3}, "bk-sdm", "3 to 54"),
        ({"joint": 19, "single": 38}, "hpp", "none"),
    ],
)
def test_leading_blocks_are_protected_by_kind(first: Any, method: str, expected: str) -> None:
    assert str(removable(FLUX, method=method, protect_first=first)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protect_first": {"double": 3}}, r"found a kind 'double', expected .*: joint \(19 blocks\), single \(38 bl"),
        ({"protect_first": {"joint": 20}}, "--protect-first joint: found 20, expected 0 to 19"),
        ({"protect_first": {"joint": -1}}, "--protect-first joint: found -1, expected 0 to 19"),
        ({"keep_components": ("ff",)}, "found 'ff', expected names from norm, context_norm, attn, mlp, context_mlp$"),
        ({"keep_components": ("attn",), "method": "koala"}, "--method hybrid, milp only, found koala"),
        ({"keep_components": ("attn",), "method": "manual", "keep": None}, "hybrid, milp only, found manual"),
    ],
)
def test_refusals_list_what_there_is(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_of(FLUX, **{"method": "hybrid", "keep": 0.8} | options)


@pytest.mark.parametrize("method", ["hpp", "hybrid", "milp", *baselines()])
def test_every_method_keeps_to_the_protection(method: str) -> None:
    options: dict[str, Any] = {"method": method, "keep": 0.9, "protect_first": {"joint": 10, "single": 30}}
    options |= {"threshold": 0.05} if method == "hybrid" else {}
    plan = plan_of(FLUX, magnitudes=[1.0 + i % 5 for i in range(57)], **options)
    touched = {block for block, _ in plan.keys}
    assert touched and touched <= {*range(10, 19), *range(49, 55)}
    with pytest.raises(BudgetError):
        plan_of(FLUX, magnitudes=[1.0] * 57, **options | {"keep": 0.3})


@pytest.mark.parametrize("method", ["hybrid", "milp"])
def test_kept_components_stay(method: str) -> None:
    options: dict[str, Any] = {"method": method, "keep": 0.7, "protect_first": 0}
    options |= {"threshold": 0.1} if method == "hybrid" else {}
    free, kept = (plan_of(LARGE, **options, keep_components=names) for names in ((), ("norm", "attn")))
    assert len(free.blocks) > len(kept.blocks)  # blocks that lost all their components
    assert kept.components and not {name for _, name in kept.components} & {"norm", "attn"}
    assert kept.after.parameters <= 0.7 * kept.before.parameters


def branches(config: Config, block: int) -> list[tuple[int, str]]:
    """Return the components of a block that are no norms."""
    family = family_of(config)
    return [(b, c) for b, c in parts(family, config, blocks=False) if b == block and c not in family.norms]


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("kind", COSTLY_KINDS)
def test_a_block_without_branches_is_a_removed_block(kind: str, block: int) -> None:
    """Block 1 and 3 are two-stream and single-stream in FLUX; block 3 of SD3 is the last, without context output."""
    model = KINDS[kind]()
    config = config_of(model)
    family = family_of(config)
    gone = branches(config, block)
    inputs = tiny_inputs()
    mean = family.modulation_input(model, inputs["timestep"], inputs["pooled_projections"], 3.0).mean(0).detach()
    if hasattr(family.blocks(model)[block], "proj_out"):
        family.blocks(model)[block].proj_out.bias.data.zero_()  # type: ignore[union-attr]
    with swapped(swap for b, c in gone for swap in family.removal(model, b, c, mean)):
        expected = tiny_velocity(model)
    plan = make_plan(family, config, None, method="manual", components=",".join(f"{b}:{c}" for b, c in gone))
    assert plan.blocks == [block] and not plan.components and plan.stock
    assert (tiny_velocity(prune(family, model, config, plan, None)) - expected).abs().max() <= 1e-5
    assert (tiny_velocity(model) - expected).abs().max() > 1e-4
    assert collapsed(family, config, gone[:-1]) == sorted(gone[:-1])  # one branch stays, and the block with it


def test_the_last_block_that_stays_has_no_context_to_lose() -> None:
    """Without block 3, nothing reads the context of block 2: its attention and MLP are all that it had."""
    model = KINDS["sd3"]()
    config = config_of(model)
    family = family_of(config)
    gone = [(3, None), (2, "attn"), (2, "mlp")]
    assert collapsed(family, config, gone) == [(2, None), (3, None)]
    assert collapsed(family, config, gone[1:]) == gone[1:]
    everything = parts(family, config, blocks=False)
    left = collapsed(family, config, everything)
    assert sum(component is None for _, component in left) == 3  # one block always stays


def test_hybrid_removes_emptied_blocks_whole() -> None:
    """Nothing but components may go, and one block loses all of its branches."""
    config = LARGE | {"num_layers": 8}
    family = family_of(config)
    losses = {(part,): [-(0.0 if part[0] == 5 and part[1] else 9.0)] for part in parts(family, config)}
    found = ContributionReport(fingerprint(config), "sd3", 8, "m", ["p"], [0.0], losses)
    plan = make_plan(family, config, found, method="hybrid", keep=0.9, threshold=0.0)
    assert plan.blocks == [5] and not plan.components
    whole = make_plan(family, config, None, method="manual", blocks="5")
    assert plan.after == whole.after


def test_scores_of_all_branches_are_those_of_the_block() -> None:
    """`attn + mlp` of a single-stream block of FLUX.1 leaves no bias behind, as its plan will not."""
    model = KINDS["flux"]()
    config = config_of(model)
    family = family_of(config)
    with removed(family, model, [(3, "attn"), (3, "mlp")], torch.zeros(64)):
        together = tiny_velocity(model)
    with removed(family, model, [(3, None)], torch.zeros(64)):
        assert torch.equal(tiny_velocity(model), together)
