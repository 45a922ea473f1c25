"""No prompt and no seed serves two purposes: what each stage really uses, for real models and for the built-in one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import torch
from typer.testing import CliRunner

from edgeprune import shapes
from edgeprune.cli import app, screen
from edgeprune.cli.compress import _without_data
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.compare.run import prompts_to_score
from edgeprune.data.encoder import entries_of
from edgeprune.data.settings import CacheOptions, is_drawn, source_digest
from edgeprune.metrics import drawn, scoring, velocity
from edgeprune.metrics.velocity import VelocityError
from edgeprune.report import measure
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import prompts
from edgeprune.shapes import PLAIN
from edgeprune.stages import distill
from edgeprune.stages.calibration import calibration_states
from edgeprune.stages.compress import compress, forecast, preset
from edgeprune.stages.options import AnalyzeOptions, DataOptions
from edgeprune.stages.prompts import analysis_prompts, calibration_prompts
from edgeprune.stages.workspace import Workspace


def disjoint(*sets: set[Any]) -> bool:
    return all(sets) and sum(map(len, sets)) == len(set().union(*sets))


def test_purposes_of_a_real_model_share_nothing(artefact: Path) -> None:
    pairs = list(entries_of(CacheOptions("captions", 5000), None, None))
    report = json.loads((artefact / "report.json").read_text())
    wishes = scoring.wishes(["clip"])
    training = {text for _, text in pairs}
    assert training == set(prompts(Split.TRAINING))
    evaluated = {*report["prompts"], *(w.text for w in wishes), *prompts_to_score(None, None, 30, "velocity")}
    assert disjoint(
        training,
        set(analysis_prompts(AnalyzeOptions(), world=None)),
        set(calibration_prompts(None, world=None)),
        set(prompts_to_score(None, None, 30, "velocity", Split.TUNING)),
        evaluated,
    )
    assert evaluated <= set(prompts(Split.HELD_OUT))
    seeds = {*report["seeds"], *(w.seed for w in wishes)}
    assert disjoint({seed for seed, _ in pairs}, seeds) and seeds <= set(Split.HELD_OUT.seeds(1000))


def test_purposes_of_the_built_in_model_share_no_meaning() -> None:
    def keys(texts: list[str]) -> set[str]:
        return {shapes.parse(text).key for text in texts}

    assert disjoint(
        keys([pair.text for pair in entries_of(CacheOptions("shapes", 200), None, None)]),
        keys(analysis_prompts(AnalyzeOptions(), world=PLAIN)),
        keys(calibration_prompts(None, world=PLAIN)),
        keys(prompts_to_score(PLAIN, None, 30, split=Split.TUNING)),
        keys([w.text for w in scoring.wishes(["shapes"])] + prompts_to_score(PLAIN, None, 30)),
    )


def test_one_file_for_training_and_scoring_gives_different_noise(tmp_path: Path) -> None:
    """Of any length: the file's prompts are repeated for training."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo stars\n")
    trained = set(entries_of(CacheOptions(str(path), 50), None, None))
    scored = {(w.seed, w.text) for w in scoring.wishes(["clip"], prompts=path, seeds=25)}
    assert {text for _, text in trained} == {text for _, text in scored}
    assert disjoint({seed for seed, _ in trained}, {seed for seed, _ in scored})


def test_each_metric_draws_the_noise_of_its_split(source: Path, artefact: Path, monkeypatch: Any) -> None:
    asked = list[int]()
    real = velocity.noise

    def noise(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        asked.extend(seeds)
        return real(seeds, shape)

    monkeypatch.setattr(velocity, "noise", noise)
    monkeypatch.setattr(velocity, "at_once", lambda *_: 2)
    ws = Workspace(artefact, str(source))
    for split in (Split.ANALYSIS, Split.HELD_OUT):
        VelocityError(ws.pipe, ws.generation, ["a", "b", "c"], split=split)
        assert asked == split.seeds(3)
        asked.clear()
    calibration_states(ws, ["a", "b"])
    assert asked == Split.CALIBRATION.seeds(len(asked))
    seeds = list[int]()
    monkeypatch.setattr(drawn, "generate", lambda pipe, texts, given, generation: seeds.extend(given))
    drawn.Drawn("shapes", None, ws.pipe, ws.generation, ["a", "b"], split=Split.HELD_OUT, seeds=2).images()  # type: ignore[arg-type]
    assert seeds == Split.HELD_OUT.seeds(4)


def test_the_report_draws_held_out_seeds(source: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[int]]()
    real = measure.generate

    def generate(pipe: Any, texts: list[str], seeds: list[int], *rest: Any, **more: Any) -> Any:
        asked.append(seeds)
        return real(pipe, texts, seeds, *rest, **more)

    monkeypatch.setattr(measure, "generate", generate)
    measure.measure(Workspace(artefact, str(source)), True, lambda *_: None)
    assert asked == [Split.HELD_OUT.seeds(2)] * 2


def test_scenes_and_captions_have_an_identity() -> None:
    """A cache of the scenes of earlier versions, which had every meaning, is not used again."""
    assert source_digest("shapes", None) != "shapes" != source_digest("captions", None)
    assert is_drawn("captions") and not is_drawn("shapes")


def test_a_real_model_is_not_distilled_without_data(source: Path, tmp_path: Path) -> None:
    for name in ("default", "quick"):
        assert preset(name, world=None).distill is None
        assert preset(name, world=None, data="captions").distill is not None
        assert preset(name, world=PLAIN).data.source == "shapes" and preset(name, world=PLAIN).distill
    ws = Workspace(tmp_path / "out", str(source))
    options = replace(stage_runs.OPTIONS, data=DataOptions())
    with pytest.raises(
        InputError, match="no data to distill on; give --data FOLDER.* or --data captions: .* 1,024 images"
    ):
        compress(ws, options)
    assert not ws.manifest.stages
    assert "distill" not in compress(ws, replace(options, distill=None))
    assert distill.amount(ws) == "not distilled; published: 64,000 steps of 64"
    with pytest.raises(InputError, match="no data to distill on; give --data FOLDER"):
        distill.run(ws, stage_runs.OPTIONS.distill or pytest.fail(), DataOptions())
    with pytest.raises(InputError, match="--data captions: a teacher of shapes world understands only its own"):
        preset("default", world=PLAIN, data="captions").check_data(world=PLAIN)


def test_the_command_says_what_to_give(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compress", str(source), "-o", str(tmp_path / "out"), "--keep", "1", "--dry-run", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["distill_steps"] == 0
    said = list[str]()
    monkeypatch.setattr(screen, "say", said.append)
    first = _without_data(lambda *_: said.append("working"))
    first("prune"), first("prune")
    assert [line.split(" (")[0] for line in said] == ["not distilled: give --data FOLDER", "working", "working"]
    monkeypatch.undo()
    done = CliRunner().invoke(app, [*words, "--data", "captions"])
    found = json.loads(done.stdout.splitlines()[-1])
    generation = Generation.load(source)
    assert found["distill_steps"] == 1000 and "not distilled" not in done.output
    assert found["data_evaluations"] == 1024 * generation.num_inference_steps * 2
    done = CliRunner().invoke(app, [*words, "--steps", "50"])
    assert isinstance(done.exception, InputError) and "--steps 50: there is no data" in str(done.exception)


def test_a_forecast_counts_the_prompts_of_the_run(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo stars\n")
    for options in (AnalyzeOptions(prompts=str(path)), AnalyzeOptions(count=10), AnalyzeOptions()):
        expected = len(analysis_prompts(options, world=None))
        found = forecast(source, replace(stage_runs.OPTIONS, analyze=options), Generation.load(source))
        assert found["analyze_prompts"] == expected
    assert expected == 28
    with pytest.raises(InputError, match=r"found 5000, expected at most \d+; give --prompts"):
        analysis_prompts(AnalyzeOptions(count=5000), world=PLAIN)


def test_the_artefact_was_analyzed_on_the_analysis_split(artefact: Path) -> None:
    assert json.loads((artefact / "analysis.json").read_text())["prompts"] == prompts(Split.ANALYSIS, 3)
