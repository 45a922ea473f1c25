"""The table of docs/distill.md: equal work, rows that several processes share, and what is kept of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from filelock import FileLock

from edgeprune.artefact.resolve import BUILTIN, read_config
from edgeprune.experiments import tail
from edgeprune.experiments.teachers import BUILT_IN
from edgeprune.planning.make import make_plan

PAGE = Path(__file__).parents[2] / "docs" / "distill.md"


@pytest.mark.parametrize("row", list(tail.rows(BUILT_IN)), ids=lambda row: row.key)
def test_every_row_does_the_same_work(row: tail.Row) -> None:
    config, family = read_config(BUILTIN)
    of_blocks = row.removed == tail.BLOCKS
    removed = {"blocks": BUILT_IN.blocks[0]} if of_blocks else {"components": BUILT_IN.components}
    plan = make_plan(family, config, None, method="manual", **removed)
    chosen = tail.options(row, plan, 0)
    total, first, kept = plan.num_blocks, plan.first_pruned, len(plan.kept)
    if row.way == "all":
        made, a_sample = 0, total + 3 * kept
    elif row.way == "pwp":
        made, a_sample = 0, total + first + 3 * (kept - first)
    else:
        made, a_sample = chosen.states * ((2 if chosen.guidance else 1) * total + first), 3 * (kept - first)
    work = made + chosen.steps * chosen.batch * a_sample
    assert tail.WORK - chosen.batch * a_sample < work <= tail.WORK
    assert chosen.freeze_prefix == (row.way != "all") and bool(chosen.states) == (row.way == "tail")


def test_a_row_that_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    made = []

    def work() -> None:
        made.append(1)
        (tmp_path / "a").write_text("x")

    with FileLock(tmp_path / "a.lock"):  # as another process holds it
        assert not tail._alone(tmp_path / "a", work) and not made
    assert tail._alone(tmp_path / "a", work) and tail._alone(tmp_path / "a", work) and made == [1]


def test_the_page_is_made_of_the_committed_results() -> None:
    found = json.loads((PAGE.parent / "distill.json").read_text(encoding="utf-8"))
    for made in (tail.table(found, BUILT_IN), tail.differences(found)):
        assert made in PAGE.read_text(encoding="utf-8")
    for values in found.values():
        assert len(values["right"]) == len(values["tasks"]) == 7 * tail.PER_TASK
    assert re.search(r"\*\*Missing yet\*\*", PAGE.read_text(encoding="utf-8")) or len(found) == len(tail.SEEDS) * len(
        list(tail.rows(BUILT_IN))
    )


def test_differences_are_paired_by_caption() -> None:
    """Captions differ by much, rows by 0.1 in each: the interval is that of the differences."""
    _, one, other = next(tail.contrasts())
    base = {"tasks": ["a", "a", "b", "b"], "right": [0.0, 1.0, 0.5, 0.2], "decibels": [1.0, 9.0, 3.0, 5.0]}
    found = {f"{other.key}-{seed}": base | {"error": [1.0, 2.0, 3.0, 4.0]} for seed in (0, 1)}
    found[f"{one.key}-1"] = base | {"error": [1.1, 2.1, 3.1, 4.1]}
    line = tail.differences(found).splitlines()[-1]
    assert line.startswith("| PWP less all weights, from cut | 1 | +0.100 [+0.100, +0.100] | +0.000 [+0.000, +0.000] |")


def test_guidance_that_was_learned_has_no_velocity_error() -> None:
    """The metric is of velocities without guidance."""
    name, one, other = next(found for found in tail.contrasts() if found[1].guided)
    images = {"tasks": ["a", "a"], "right": [0.0, 1.0], "decibels": [1.0, 9.0], "steps": 1, "seconds": 1.0}
    found = {f"{one.key}-0": images, f"{other.key}-0": images | {"error": [1.0, 2.0]}}
    assert tail.differences(found).splitlines()[-1].startswith(f"| {name} | 1 |  | +0.000")
    assert "guidance learned | 1 | 1 |  | 0.500" in tail.table(found, BUILT_IN)
