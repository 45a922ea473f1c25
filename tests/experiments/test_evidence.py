"""The rows of docs/evidence.md: what they run, what is kept of them, and the page that is made from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.common.files import read_json, write_json
from edgeprune.experiments import evidence
from edgeprune.shapes import PLAIN

PAGE = "<!-- demo-untrained -->\n<!-- end -->\n<!-- rows -->\n<!-- end -->\n"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is kept of rows, empty."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "kept")
    return tmp_path / "kept"


def results(row: evidence.Row) -> dict[str, Any]:
    """Runs of a row that pass all images of the original and half of the others."""
    run = {"blocks": [1], "components": [], "modulation_rank": None, "bytes": 16, "step_ratio": 0.5, "train_s": 1.0}
    found: dict[str, Any] = {"original": {"scores": [1.0] * len(row.prompts), "bytes": 100, "seconds": 60.0}}
    for one in row.grid.rows:
        for seed in range(one.seeds):
            scores = [float(i % 2) for i in range(len(row.prompts))]
            found[f"{one.name}/seed-{seed}"] = run | {"scores": scores, "seconds": 60.0, "steps": 100}
    return found


def test_rows_are_grids_at_budgets() -> None:
    known = evidence.rows()
    for name, row in known.items():
        assert row.name == name and row.grid.rows
        assert name in evidence.OWN_PLACES or row.teacher.name in row.title
    row = known["shapes-untrained-0.12"]
    assert row.grid.budget == 0.12 and known["shapes-untrained-0.16"].grid.budget == 0.16
    assert all(one.options.distill is None for one in row.grid.rows)
    assert {one.seeds for one in row.grid.rows if one.options.plan.method == "random"} == {5}
    trained = known["shapes-equal-work"].grid.rows
    assert {one.seeds for one in trained if one.work} == {3} and len([one for one in trained if one.work]) == 5
    assert len(row.prompts) == 30 * len(PLAIN.grammar.names) == len(row.tasks)


def test_what_has_run_is_kept_and_goes_on(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, seen = evidence.rows()["shapes-untrained-0.16"], list[Any]()
    whole = results(row)

    def compared(base: Any, grid: Any, metric: str, prompts: list[str], out: Path, progress: Any) -> None:
        path = out / "results.json"
        seen.append(read_json(path) if path.is_file() else None)
        assert (grid.budget, metric, prompts) == (0.16, "shapes", row.prompts)
        if len(seen) == 1:
            write_json(path, {"original": whole["original"]})
            raise KeyboardInterrupt
        write_json(path, whole)

    monkeypatch.setattr(evidence, "compare", compared)
    with pytest.raises(KeyboardInterrupt):
        evidence.measure(row, tmp_path / "one")
    assert not evidence.is_done(row) and read_json(kept / f"{row.name}.json")["results"].keys() == {"original"}
    evidence.measure(row, tmp_path / "elsewhere")
    assert seen == [None, {"original": whole["original"]}] and evidence.is_done(row)
    assert "| shapes-untrained-0.16 | shapes | untrained | 0.16 | 14 | yes |" in evidence.listing()


def test_the_page_is_made_of_what_is_kept(kept: Path, tmp_path: Path) -> None:
    known, page = evidence.rows(), tmp_path / "page.md"
    kept.mkdir()
    for name in ("demo-untrained", "shapes-untrained-0.22", "shapes-equal-work"):
        row = known[name]
        write_json(
            kept / f"{name}.json",
            {"grid": evidence._identity(row), "machine": "a machine", "results": results(row)},
        )
    other = known["shapes-untrained-0.12"]  # kept, but of another grid
    write_json(kept / f"{other.name}.json", {"grid": "x", "machine": "a machine", "results": results(other)})
    page.write_text(PAGE)
    evidence.write_page(page)
    text = page.read_text()
    own, rest = text.split("<!-- rows -->")
    assert "| modulation |" in own and (tmp_path / "page-demo-untrained.svg").is_file()
    assert [line for line in rest.splitlines() if line.startswith("### ")] == [
        "### shapes at 0.16 of the bf16 bytes, trained for equal work",
        "### shapes at 0.22 of the bf16 bytes, not trained",
    ]
    assert "| ours (3 seeds, 100 steps) |" in rest and "a machine, 15 minutes." in rest
    assert {p.name for p in tmp_path.iterdir()} == {"kept", "page.md", "page-demo-untrained.svg"}
    evidence.write_page(page)
    assert page.read_text() == text


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = tmp_path / "evidence.md"
    page.write_text((docs / "evidence.md").read_text("utf-8"), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "RESULTS", docs / "evidence")
        evidence.write_page(page)
    assert page.read_text("utf-8") == (docs / "evidence.md").read_text("utf-8")
