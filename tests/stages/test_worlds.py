"""A teacher of another world goes through all stages with this world's captions, scenes, tasks and checker."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stage_runs
from PIL import Image
from teachers import rich_teacher

from edgeprune.api import score
from edgeprune.api.folders import world_drawn, world_given
from edgeprune.common.splits import Split
from edgeprune.data import encoder
from edgeprune.data.settings import source_digest
from edgeprune.metrics import scoring
from edgeprune.report.make import make_report
from edgeprune.shapes import PLAIN, RICH
from edgeprune.stages.choice import choose
from edgeprune.stages.compress import compress, preset
from edgeprune.stages.options import DataOptions
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import STAGES, Workspace


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich_teacher(tmp_path_factory.mktemp("teachers") / "rich-sd3")


def split_of(texts: list[str]) -> set[Split]:
    return {RICH.grammar.split(RICH.grammar.parse(text)) for text in texts}


def test_each_stage_uses_the_split_of_this_world(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, real = list[Any](), encoder.entries_of

    def entries_of(*arguments: Any) -> Any:
        given.append(arguments)
        return real(*arguments)

    monkeypatch.setattr("edgeprune.data.encode.entries_of", entries_of)
    ws = Workspace(tmp_path / "out", str(teacher))
    assert ws.world is RICH is world_given(tmp_path / "new", teacher) and not ws.builtin
    # Without a source of data, as for the built-in model.
    options = replace(stage_runs.OPTIONS, data=DataOptions(None, 8))
    assert compress(ws, options) == list(STAGES)

    analysis = json.loads((ws.out / "analysis.json").read_text())
    assert split_of(analysis["prompts"]) == {Split.ANALYSIS}
    assert split_of(calibrating(ws)) == {Split.CALIBRATION}
    scenes = list(real(*given[0]))
    assert len(scenes) == 8 and scenes[0].image.size == (128, 128)
    assert split_of([scene.text for scene in scenes]) == {Split.TRAINING}
    report = make_report(ws, quick=True)
    assert split_of(report["prompts"]) == {Split.HELD_OUT} and report["images"] == 2 * 9
    assert report["quality"]["tasks"]["original"].keys() == {*RICH.grammar.names}
    assert world_drawn(ws.out) is RICH is world_given(ws.out)


def test_data_of_another_world_is_other_data() -> None:
    assert source_digest("shapes", RICH) == "shapes, rich, training" != source_digest("shapes", PLAIN)
    assert source_digest("captions", RICH) == source_digest("captions", None)


def test_it_has_the_preset_of_the_built_in_model(teacher: Path, tmp_path: Path) -> None:
    options = preset("quick", world=RICH)
    assert options == preset("quick", world=PLAIN) and options.data.source == "shapes" and options.distill
    ws = Workspace(tmp_path / "out", str(teacher))
    assert ws.subject.world is RICH and choose(ws.subject, options, 1e9, Speeds(1e-6)).images == 9 * 15


def test_tune_and_score_know_the_world_of_a_folder(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "edgeprune_export.json").write_text(json.dumps({"source": str(teacher)}))
    assert world_drawn(tmp_path) is RICH
    for source in (str(tmp_path / "elsewhere"), "owner/name", None):
        (tmp_path / "edgeprune_export.json").write_text(json.dumps({"source": source}))
        assert world_drawn(tmp_path) is None
    (tmp_path / "edgeprune_export.json").write_text(json.dumps({"source": "built-in"}))
    assert world_drawn(tmp_path) is PLAIN
    texts = [wish.text for wish in scoring.wishes(["shapes"], per_task=1, split=Split.TUNING, world=RICH)]
    assert len(texts) == 9 and split_of(texts) == {Split.TUNING}
    Image.new("RGB", (128, 128)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": texts[-1]}) + "\n")
    assert score(tmp_path, ["shapes"]).scores[0].tasks == {"typography": 0.0}
