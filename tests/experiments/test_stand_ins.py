"""The tables of docs/stand-ins.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.experiments import stand_ins
from edgeprune.experiments.teachers import BUILT_IN

PAGE = Path(__file__).parents[2] / "docs" / "stand-ins.md"


def test_the_page_is_made_of_the_committed_results() -> None:
    found = json.loads((PAGE.parent / "stand-ins.json").read_text(encoding="utf-8"))
    assert {row.key for row in stand_ins.rows(BUILT_IN)} == found.keys()
    for made in (stand_ins.table(found, BUILT_IN), stand_ins.differences(found, BUILT_IN)):
        assert made in PAGE.read_text(encoding="utf-8")
    for values in found.values():
        assert len(values["right"]) == len(values["tasks"]) == 7 * stand_ins.PER_TASK
