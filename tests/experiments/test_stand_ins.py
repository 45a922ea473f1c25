"""The tables of docs/stand-ins.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.experiments import stand_ins

PAGE = Path(__file__).parents[2] / "docs" / "stand-ins.md"


def test_the_page_is_made_of_the_committed_results() -> None:
    found = json.loads((PAGE.parent / "stand-ins.json").read_text(encoding="utf-8"))
    assert {row.key for row in stand_ins.rows()} == found.keys()
    for made in (stand_ins.table(found), stand_ins.differences(found)):
        assert made in PAGE.read_text(encoding="utf-8")
    for values in found.values():
        assert len(values["right"]) == len(values["tasks"]) == 7 * stand_ins.PER_TASK
