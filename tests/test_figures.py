"""Figures in docs/ that must agree with each other: steps of equal block counts, verdicts and leads, sums of parts."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GRIDS = ("demo", "demo-untrained")


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without the lines under the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def grid(name: str) -> list[dict[str, str]]:
    """The rows of a table of evidence.md, by column."""
    page = (DOCS / "evidence.md").read_text("utf-8")
    head, *body = rows(page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0])
    return [dict(zip(head, cells, strict=True)) for cells in body]


@pytest.mark.parametrize("name", GRIDS)
def test_as_many_blocks_take_as_long(name: str) -> None:
    """Blocks of one model are alike: a step without as many of them takes the same time within 15 %."""
    steps = defaultdict(list)
    for row in grid(name):
        if match := re.fullmatch(r"blocks ([\d, ]+)", row["removed"]):
            steps[match[1].count(",") + 1].append(float(row["step"].split()[0]))
    assert steps and all(max(times) < 1.15 * min(times) for times in steps.values()), steps


@pytest.mark.parametrize("name", GRIDS)
def test_wins_are_over_prompts_and_seeds(name: str) -> None:
    for row in grid(name):
        if not (lead := row["lead of the reference"]):
            continue
        low, high = map(float, re.findall(r"[-+]\d\.\d+", lead)[1:])
        if row["the reference"] in ("wins", "loses"):
            assert low > 0 or high < 0, row
            assert "1 seed" not in row["row"], row
        elif row["the reference"] == "undecided":
            assert low <= 0 <= high, row
        elif row["the reference"] != "earlier recipe":
            assert row["the reference"] == "one seed" and "1 seed" in row["row"], row


def test_memory_of_a_process_is_the_sum_of_its_parts() -> None:
    page = (DOCS / "scale.md").read_text("utf-8")
    table = [cells for cells in rows(page) if re.fullmatch(r"`\dx\d+gb`", cells[0])]
    assert len(table) == 5
    for _, _, *parts, total in table:
        sizes = [float(part) for part in parts if re.fullmatch(r"[\d.]+", part)]
        assert sum(sizes) == pytest.approx(float(total), abs=0.11)


def test_the_reviews_tests_exist() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (DOCS / "review.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}" in (tests / file).read_text(encoding="utf-8"), f"{file}::{test}"
