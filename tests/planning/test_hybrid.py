"""The method `hybrid`: what counts as removed in whole blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.analysis.contribution import ContributionReport, Key, fingerprint, parts
from edgeprune.families import Config, family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.options import PlanOptions

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
LARGE = CONFIGS["sd3.5-large"]


def scores(config: Config, drops: dict[Key, float] | None = None) -> ContributionReport:
    """Return a report of these drops; by default every part drops by a little more than the part before it."""
    family = family_of(config)
    drops = drops or {part: 0.01 * i for i, part in enumerate(parts(family, config))}
    return ContributionReport(
        fingerprint(config), family.name, family.block_count(config), "m", ["p"], [0.0],
        {(part,): [-drop] for part, drop in drops.items()},
    )  # fmt: skip


@pytest.mark.parametrize(("rank", "keep"), [(None, 0.65), (256, 0.55)])
def test_the_threshold_counts_blocks_and_not_the_modulation(rank: int | None, keep: float) -> None:
    """Rank 256 alone leaves 0.702 of SD3.5 Large, less than the 0.85 that the threshold allows blocks to leave."""
    family = family_of(LARGE)
    start = make_plan(family, LARGE, None, method="manual", modulation_rank=rank).after.parameters
    options = PlanOptions("hybrid", keep=keep, modulation_rank=rank, keep_components=("attn",))  # no block loses all
    plan = make_plan(family, LARGE, scores(LARGE), options)
    assert plan.blocks and plan.components
    listed = ",".join(map(str, plan.blocks))
    blocks_alone = make_plan(family, LARGE, None, method="manual", blocks=listed, modulation_rank=rank)
    removed = 1 - blocks_alone.after.parameters / start
    one_more = removed * (len(plan.blocks) + 1) / len(plan.blocks)
    assert removed <= PlanOptions().threshold < one_more


def test_plans_that_the_threshold_changed_are_planned_again() -> None:
    """Digests of plans that the count of the modulation cannot have changed stay those of older folders."""
    usual = PlanOptions("hybrid", keep=0.6)
    for rank in (256, "auto"):
        changed = PlanOptions("hybrid", keep=0.6, modulation_rank=rank)
        assert changed.to_json().keys() - usual.to_json().keys() == {"threshold_of"}
    for method, threshold in (("hybrid", 0.0), ("hpp", 0.15), ("milp", 0.15)):
        same = PlanOptions(method, keep=0.6, threshold=threshold, modulation_rank=256)
        assert same.to_json().keys() == usual.to_json().keys()
