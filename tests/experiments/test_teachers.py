"""Experiments on another teacher: its results never mix with those of the built-in model, which keep their places."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from teachers import rich_teacher

from edgeprune.artefact import teachers
from edgeprune.common.errors import InputError
from edgeprune.experiments import held_out, pages, solvers, tail
from edgeprune.experiments.teachers import BUILT_IN, TEACHERS, Teacher
from edgeprune.sampling.generation import Generation
from edgeprune.stages.workspace import Workspace

RICH = TEACHERS["rich-sd3"]


def test_results_have_the_name_of_their_teacher() -> None:
    assert TEACHERS.keys() == teachers.TEACHERS.keys()
    out, file = Path("build/tail"), Path("docs/distill.json")
    assert (BUILT_IN.folder(out), BUILT_IN.results(file), BUILT_IN.named("measured")) == (out, file, "measured")
    assert RICH.folder(out) == out / "rich-sd3" and RICH.results(file) == Path("docs/distill-rich-sd3.json")
    assert RICH.named("measured") == "measured-rich-sd3" and BUILT_IN.model is None


def test_the_command_measures_and_writes_for_one_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, asked = tmp_path / "page.md", list[tuple[Path, str]]()
    page.write_text("<!-- measured -->\na\n<!-- end -->\n<!-- measured-rich-sd3 -->\nb\n<!-- end -->\n")

    def table(out: Path, teacher: Teacher) -> str:
        asked.append((out, teacher.name))
        return "new"

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["x", "-o", "out", "--write", str(page), *words])
        pages.command("x", None, table)

    run("--teacher", "rich-sd3")
    assert page.read_text().split() == ["<!--", "measured", "-->", "a", "<!--", "end", "-->"] + [
        *("<!--", "measured-rich-sd3", "-->", "new", "<!--", "end", "-->")
    ]
    run()
    assert page.read_text().count("new") == 2
    assert asked == [(Path("out/rich-sd3"), "rich-sd3"), (Path("out"), "shapes")]
    with pytest.raises(SystemExit):
        run("--teacher", "rich-flux")
    assert "found no <!-- measured-rich-flux -->; add it and <!-- end -->" in capsys.readouterr().err
    assert len(asked) == 2  # nothing is measured for a page that has no place for it


def test_a_teacher_that_is_not_trained_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(teachers.TEACHERS, "rich-sd3", tmp_path)
    with pytest.raises(InputError, match="--teacher rich-sd3: .* make assets ONLY=rich-sd3"):
        _ = RICH.model


def test_captions_and_checker_are_those_of_the_teacher(tmp_path: Path) -> None:
    held = held_out.Held(Workspace(tmp_path / "out", str(rich_teacher(tmp_path / "teacher"))), 1)
    assert held.tasks == [*RICH.world.grammar.names] and held.images.shape == (9, 128, 128, 3)
    found = held.measure(held.ws.teacher)
    assert found["error"] == [0.0] * 9 and set(found["right"]) <= {0.0, 1.0}


def test_guidance_that_is_an_input_is_not_learned_or_limited() -> None:
    flux, own = TEACHERS["rich-flux"], Generation(20, 2.0, 128, 128, 22)
    assert [row for row in tail.rows(BUILT_IN) if row.guided] and not [row for row in tail.rows(flux) if row.guided]
    few, more = (list(solvers.settings(own, guided=teacher.guided)) for teacher in (flux, BUILT_IN))
    assert {one.guidance_range for one in few} == {(0.0, 1.0)} and len(few) < len(more)


def test_the_built_in_model_has_the_rows_that_it_had() -> None:
    """Their names are the keys of committed results."""
    kept = json.loads((Path(__file__).parents[2] / "docs" / "distill.json").read_text(encoding="utf-8"))
    assert {f"{row.key}-{seed}" for row in tail.rows(BUILT_IN) for seed in tail.SEEDS} >= kept.keys()
