"""The artefact folder: what it may hold, its settings, hashes of the original, and what is loaded of it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import OPTIONS

from edgeprune.artefact.staged import StagedPipeline
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.memory import ComputeOptions
from edgeprune.sampling.denoising import encode_prompts
from edgeprune.stages import analyze, distill
from edgeprune.stages.compress import compress
from edgeprune.stages.differences import differences
from edgeprune.stages.options import DataOptions
from edgeprune.stages.prompts import analysis_prompts
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions


def test_workspace_refuses_strange_folders(source: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not a folder of edgeprune"):
        Workspace(tmp_path, str(source))
    with pytest.raises(StaleStageError, match="made from"):
        Workspace(artefact, str(Path(shutil.copytree(source, tmp_path / "other"))))
    with pytest.raises(InputError, match="no such folder"):
        Workspace(tmp_path / "new", "./nothing-here")
    with pytest.raises(InputError, match="edgeprune prune"):
        distill.run(Workspace(tmp_path / "new", str(source)), DistillOptions(), DataOptions())


def test_how_images_are_made_is_kept(source: Path, copy: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), generation={"num_inference_steps": 3, "height": 16})
    assert (ws.generation.num_inference_steps, ws.generation.height) == (3, 16)
    assert Workspace(tmp_path / "out", str(source)).generation == ws.generation
    with pytest.raises(InputError, match="num_inference_steps: found 0"):
        Workspace(tmp_path / "other", str(source), generation={"num_inference_steps": 0})
    with pytest.raises(InputError, match="height: found 60, expected a multiple of 8"):
        Workspace(tmp_path / "odd", str(source), generation={"height": 60})
    assert not (tmp_path / "odd").exists()
    with pytest.raises(StaleStageError, match="begun with num_inference_steps"):
        Workspace(copy, str(source), generation={"num_inference_steps": 5})
    Workspace(copy, str(source), generation={"num_inference_steps": 5}, fresh=True)
    assert Workspace(copy, str(source)).generation.num_inference_steps == 5


def test_the_same_solver_and_range_of_guidance_are_no_change(source: Path, copy: Path) -> None:
    Workspace(copy, str(source), generation={"solver": "euler", "guidance_range": (0, 1)})  # an older folder's own
    asked = {"solver": "ab2", "guidance_range": (0.5, 1.0)}
    with pytest.raises(StaleStageError, match=r"begun with solver euler, guidance_range \(0.0, 1.0\)"):
        Workspace(copy, str(source), generation=asked)
    Workspace(copy, str(source), generation=asked, fresh=True)
    again = Workspace(copy, str(source), generation=asked)
    assert (again.generation.solver, again.generation.guidance_range) == ("ab2", (0.5, 1.0))
    sibling = again.sibling(copy.with_name("sibling"))
    assert sibling.generation == again.generation


def test_source_is_hashed_once_unless_it_changes(source: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Workspace(artefact, str(source)).weights_hash
    monkeypatch.setattr("edgeprune.common.hashes.sha256_file", lambda path: pytest.fail(f"read {path} again"))
    assert Workspace(artefact, str(source)).weights_hash == first
    monkeypatch.undo()
    config = source / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    config.write_text(before + " ")
    try:
        assert Workspace(artefact, str(source)).weights_hash != first
    finally:
        config.write_text(before)


def test_a_clock_that_was_set_makes_nothing_stale(source: Path, copy: Path) -> None:
    for time_ns in (0, 4 * 10**18):
        for path in (p for folder in (source, copy) for p in folder.rglob("*") if p.is_file()):
            os.utime(path, ns=(time_ns, time_ns))
        assert compress(Workspace(copy, str(source)), OPTIONS) == []


def test_siblings_share_what_is_loaded_until_one_releases_it(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "first", str(source), compute=ComputeOptions("cpu", 10**11))
    assert not ws.original.loaded
    other = ws.sibling(tmp_path / "second")
    assert other._compute is ws.original.compute
    assert other.pipe is ws.pipe and other.teacher is ws.teacher is ws.pipe.transformer
    assert (other.cache, other.weights_hash) == (ws.cache, ws.weights_hash)
    other.original.release()
    assert not other.original.loaded and ws.original.loaded.keys() == {"pipe", "transformer"}
    assert other.teacher is not ws.teacher


def counted_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by its name whenever a text encoder is read."""
    seen, load = list[str](), StagedPipeline._streamed

    def counted(self: StagedPipeline, name: str, *args: Any, **options: Any) -> Any:
        seen.append(name)
        return load(self, name, *args, **options)

    monkeypatch.setattr(StagedPipeline, "_streamed", counted)
    return seen


def test_no_prompt_is_encoded_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted_loads(monkeypatch)
    ws = Workspace(tmp_path / "out", str(source))
    analyze.run(ws, replace(OPTIONS.analyze, estimator="gates", components=False))
    assert seen == ["text_encoder", "text_encoder_2"]  # the mean of the modulation needs the same prompts
    ws.original.release()
    again = encode_prompts(ws.pipe, ["", *analysis_prompts(OPTIONS.analyze, world=None)], 0)
    assert len(seen) == 2 and again.hidden.shape[0] == 1 + OPTIONS.analyze.count


def test_a_plan_reads_no_transformer(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    embedder = ws.encoders.transformer
    assert "transformer" not in ws.original.loaded
    assert ws.pipe.transformer is ws.teacher and ws.encoders.transformer is embedder
    ws.original.release()
    assert not ws.original.loaded


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"count": 28}, {"count": 7}, "count=28, not 7"),
        ({"options": {"steps": 3}}, {"options": {"steps": 4}}, "options.steps=3, not 4"),
        ({"prompts": ["a" * 50]}, {"prompts": ["b"]}, "other prompts"),
        (
            {"a": 1},
            {"a": 2, "b": 3, "c": 4, "d": 5},
            "a=1, not 2; b=the default, not 3; c=the default, not 4 and 1 more",
        ),
        ({"sizes": [1, 2]}, {"sizes": (1, 2)}, "another model, or after other stages"),
    ],
)
def test_what_differs_is_named(before: dict[str, object], now: dict[str, object], said: str) -> None:
    assert differences(before, now) == said
