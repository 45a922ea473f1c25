"""edgeprune.api from end to end on a tiny model, and the same through the command line: one result, printed as JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fakes import worker_reply
from PIL import Image
from stage_runs import OPTIONS
from typer.testing import CliRunner

from edgeprune import api, export, targets
from edgeprune.api import _MODULE_OF
from edgeprune.bench import run as bench_run
from edgeprune.cli import app
from edgeprune.common import extras
from edgeprune.common.errors import BudgetError, InputError, MissingExtraError, StaleStageError
from edgeprune.sampling.generation import Generation, GenerationOptions


def printed(*words: object) -> Any:
    """What a command prints with --json."""
    found = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert found.exit_code == 0, (found.output, found.exception)
    return json.loads(found.stdout.splitlines()[-1])


def as_printed(result: Any) -> Any:
    """A result's JSON after a round trip, which turns tuples into lists."""
    return json.loads(json.dumps(result.to_json(), allow_nan=False))


def test_the_door_names_what_it_exports() -> None:
    assert sorted(api.__all__) == sorted(_MODULE_OF) == sorted(set(dir(api)))
    for name in api.__all__:
        value = getattr(api, name)
        assert value.__doc__ and value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = api.nothing


def test_no_function_takes_a_bag_of_options() -> None:
    """Every parameter has a name and a type of its own, and every function has a result."""
    functions = [f for name in api.__all__ if inspect.isfunction(f := getattr(api, name))]
    assert len(functions) > 5
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        assert not {p.kind for p in parameters} & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        types = [*(str(p.annotation) for p in parameters), str(function.__annotations__["return"])]
        assert not [t for t in types if re.search(r"\b(Any|dict|Mapping|None)$", t.removesuffix(" | None"))], types


@pytest.mark.parametrize("verb", ["bench", "export", "generate", "score"])
def test_defaults_are_those_of_the_command(verb: str) -> None:
    module = import_module(f"edgeprune.cli.{verb}")
    command, function = (
        {p.name: p.default for p in inspect.signature(f).parameters.values()}
        for f in (getattr(module, verb), getattr(api, verb))
    )
    shared = {name for name in command.keys() & function.keys() if function[name] is not inspect.Parameter.empty}
    assert len(shared) > 1
    assert {name: command[name] for name in shared} == {name: function[name] for name in shared}


def test_report_figures_are_what_the_file_holds() -> None:
    names = [field.name for field in dataclasses.fields(api.ReportFigures)]
    quality = {
        "metric": "shapes", "original": [1.0, 0.5, 1.0], "compressed": [0.5, 0.25, 1.0], "relative_drop": None,
        "tasks": {"original": {"colors": [0.5, None, None]}, "compressed": {"colors": [0.25, 0.0, 1.0]}},
    }  # fmt: skip
    content = dict.fromkeys(names, 1) | {"quality": quality, "step_ratio_quartiles": [0.5, 0.75]}
    figures = api.ReportFigures.of(content)
    assert figures.quality is not None and figures.quality.original.low == 0.5
    assert figures.quality.tasks["original"]["colors"].high is None
    assert as_printed(figures) == content
    assert figures.step_ratio_quartiles == (0.5, 0.75)
    absent = {"quality": None, "step_ratio_quartiles": None}
    assert not absent.keys() & api.ReportFigures.of(content | absent).to_json().keys()


def test_a_method_that_is_not_there_is_named(tmp_path: Path) -> None:
    """It was taken for one that needs scores."""
    with pytest.raises(InputError, match="'kaola', expected one of "):
        api.plan_of_config(tmp_path / "none.json", api.PlanOptions(method="kaola"))


def test_the_stages_one_by_one(source: Path, tmp_path: Path) -> None:
    """Each function runs its stage once; its command prints the same JSON and does nothing more."""
    out = tmp_path / "small"
    analyzed = api.analyze(source, out, OPTIONS.analyze)
    assert analyzed.ran and analyzed.path.is_file() and len(analyzed.report.contributions()) > 3
    words = ("--count", OPTIONS.analyze.count)
    assert printed("analyze", source, "-o", out, *words) == as_printed(analyzed)
    planned = api.plan(out, OPTIONS.plan)
    assert planned.ran and planned.plan.after.parameters < planned.plan.before.parameters
    words = ("--keep", 0.95, "--protect-first", 1, "--protect-last", 0, "--modulation-rank", "full")
    assert printed("plan", "-o", out, *words) == as_printed(planned)
    with pytest.raises(StaleStageError, match=r"plan was done with keep=0\.95, not 0\.9; use --fresh"):
        api.plan(out, dataclasses.replace(OPTIONS.plan, keep=0.9))
    pruned = api.prune(out)
    assert pruned.ran and (out / "transformer").is_dir()
    assert printed("prune", "-o", out) == as_printed(pruned) | {"ran": False}
    distilled = api.distill(out, OPTIONS.distill, OPTIONS.data)
    assert distilled.ran and distilled.last_loss > 0
    needed = api.forecast_distill(out, OPTIONS.distill)
    assert needed.rank_bytes > needed.teacher_bytes > needed.student_bytes > 0 and needed.processes == 1
    words = ("--data", "shapes", "--samples", 16, "--steps", 3, "--batch", 2)
    assert printed("distill", "-o", out, *words) == as_printed(distilled) | {"ran": False}
    assert printed("distill", "-o", out, *words, "--dry-run") == as_printed(needed)
    quantized = api.quantize(out)
    stored = sum(p.stat().st_size for p in (out / "transformer_int4").glob("*.safetensors"))
    assert quantized.ran and 0 < quantized.weights_bytes <= stored
    assert printed("quantize", "-o", out) == as_printed(quantized) | {"ran": False}
    commands = [s["command"] for s in json.loads((out / "edgeprune.json").read_text())["stages"].values()]
    assert commands == [""] * 5  # nothing was typed


def test_compress(source: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "small", dataclasses.replace(OPTIONS, distill=None)
    expected = api.forecast_compress(source, out, options)
    assert expected.blocks == 3 and expected.distill_steps == 0 and not out.exists()
    made = api.compress(source, out, options, quick=True)
    assert made.ran == ("analyze", "plan", "prune", "quantize") and made.no_report == ""
    assert made.report is not None and made.report.psnr_db > 0 and made.plan.after.parameters <= expected.parameters
    again = api.compress(None, out, options, quick=True)
    assert made.read_bytes > made.written_bytes > 0
    assert again.ran == () and as_printed(again) == as_printed(made) | {"ran": [], "read_bytes": 0, "written_bytes": 0}


@pytest.mark.parametrize("call", [api.compress, api.forecast_compress])
def test_a_training_that_the_device_cannot_run_is_refused_first(call: Any, source: Path, tmp_path: Path) -> None:
    training = api.DistillOptions(steps=2, batch=2, mixed_precision="fp16")
    plan = api.PlanOptions("manual", blocks="1")
    options = api.CompressOptions(plan=plan, distill=training, data=api.DataOptions("shapes", 2))
    with pytest.raises(InputError, match="--mixed-precision: found fp16, expected no or bf16 on cpu"):
        call(source, tmp_path / "out", options, compute=api.ComputeOptions("cpu"))
    assert (
        not list(tmp_path.glob("out/*.json")) or not json.loads((tmp_path / "out/edgeprune.json").read_text())["stages"]
    )


def test_bad_input_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    with pytest.raises(InputError, match="begin with: edgeprune analyze MODEL"):
        api.prune(out)
    with pytest.raises(InputError, match="no such folder"):
        api.compress(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="multiple of 8"):
        api.analyze(source, out, OPTIONS.analyze, generation=api.GenerationOptions(height=63))
    with pytest.raises(BudgetError):
        api.compress(source, out, dataclasses.replace(OPTIONS, plan=api.PlanOptions(max_size_bytes=9000)))
    assert not out.exists()


def test_a_missing_package_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "absent", lambda package: package == "torch")
    with pytest.raises(MissingExtraError, match=r"torch is not installed; run: pip install 'edgeprune\[compress\]'"):
        api.analyze(source, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_folder_is_resumed_with_its_settings(source: Path, tmp_path: Path) -> None:
    out, smaller = tmp_path / "small", api.GenerationOptions(height=32, num_inference_steps=2)
    api.analyze(source, out, OPTIONS.analyze, generation=smaller)
    assert json.loads((out / "edgeprune.json").read_text())["generation"]["height"] == 32
    assert not api.analyze(None, out, OPTIONS.analyze).ran
    with pytest.raises(StaleStageError, match="begun with height 32"):
        api.analyze(None, out, OPTIONS.analyze, generation=api.GenerationOptions(height=64))


def test_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing itself is tested in tests/export; here it only takes note of what it was asked."""
    asked = []

    def write(*arguments: Any, modulation: str | None, progress: Any) -> dict[str, Any]:
        asked.append((*arguments, modulation))
        return {"target": "onnx", "quantized": False, "parity": {"vae_decoder": {"psnr_db": 90.0}}}

    monkeypatch.setattr(export, "export", write)
    made = api.export(str(source), tmp_path / "onnx", device="cpu-arm")
    assert asked == [(source, tmp_path / "onnx", "onnx", targets.load("cpu-arm"), None)]
    assert (made.out, made.target, made.device, made.quantized) == (tmp_path / "onnx", "onnx", "cpu-arm", False)
    assert printed("export", source, "-o", tmp_path / "onnx", "--device", "cpu-arm") == as_printed(made) == made.record
    with pytest.raises(InputError, match="is a file"):
        api.export(source, source / "model_index.json" / "onnx")


def test_generate(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tiny_folders[1]
    drawn = api.generate(folder, "two red circles", generation=api.GenerationOptions(height=32), seed=3)
    assert drawn.image.size == (64, 32) and drawn.runtime in ("openvino", "ort")
    words = ("two red circles", "--model", folder, "--height", 32, "--seed", 3, "-o", tmp_path / "out.png")
    assert printed("generate", *words) == {"out": str(tmp_path / "out.png")} | as_printed(drawn)
    with Image.open(tmp_path / "out.png") as image:
        assert image.tobytes() == drawn.image.tobytes()
    with pytest.raises(InputError, match="--height: found 63, expected a multiple of 8"):
        api.generate(folder, "x", generation=api.GenerationOptions(height=63))


def test_score(source: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    made = api.score(source, ["psnr"], against=source, prompts=tmp_path / "prompts.txt", out=tmp_path / "images")
    assert made.scores[0].score[0] == 100 and made.drawn == ("images", "original")
    words = ("--metric", "psnr", "--against", source, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "images")
    assert printed("score", source, *words) == as_printed(made)
    lines = list[str]()
    again = api.score(
        tmp_path / "images" / "images", ["psnr"], against=tmp_path / "images" / "original", memory=6 * 10**9,
        progress=lambda what, *_: lines.append(what),
    )  # fmt: skip
    assert lines[0] == "--memory: no image is drawn, so it is not used"
    assert again.drawn == () and again.scores == made.scores


@pytest.mark.parametrize("exist", [False, True])
def test_an_original_is_drawn_as_large_as_what_is_scored(source: Path, tmp_path: Path, exist: bool) -> None:
    small, out, lines = Path(shutil.copytree(source, tmp_path / "small")), tmp_path / "images", list[str]()
    Generation.load(small).changed(GenerationOptions(height=32, width=48), "test").save(small)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = {"against": source, "out": out, "progress": lambda what, *_: lines.append(what)}
    if exist:
        api.score(small, ["psnr"], against=small, prompts=tmp_path / "prompts.txt", out=out)
        shutil.rmtree(out / "original")
        made = api.score(out / "images", ["psnr"], **given)
    else:
        made = api.score(small, ["psnr"], prompts=tmp_path / "prompts.txt", **given)
    assert "original: drawn at 48x32, as the images are; its own size is 64x64" in lines
    assert made.drawn == (("original",) if exist else ("images", "original")) and made.scores[0].score[0] == 100
    with Image.open(out / "original" / "00000.png") as image:
        assert image.size == (48, 32)
    other = tmp_path / "other"
    if not exist:  # what exists is not drawn again in another size: said before anything is drawn
        with pytest.raises(InputError, match="--against: found images of 48x32, expected 64x64 as"):
            api.score(source, ["psnr"], against=out / "original", out=other)
        assert not other.exists()


def test_bench(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have a stand-in; tests/bench runs real ones."""
    monkeypatch.setattr(bench_run, "_worker", worker_reply)
    told: list[str] = []
    found = api.bench([source], baseline=source, repeats=2, progress=lambda what, *_: told.append(what))
    assert found.comparisons["compressed"].ratios["peak_ratio"] == 0.4 and told
    data = as_printed(found)
    result = CliRunner().invoke(app, ["bench", str(source), "--baseline", str(source), "--json", str(tmp_path / "b")])
    assert result.exit_code == 0, result.exception
    written = json.loads((tmp_path / "b").read_text())
    assert written["comparisons"] == data["comparisons"]
    assert [v["name"] for v in written["variants"]] == [v["name"] for v in data["variants"]]
    with pytest.raises(InputError, match="nowhere"):
        api.bench([tmp_path / "nowhere"], baseline=source)


def test_a_bench_has_images_of_one_size(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, other, sizes = Path(shutil.copytree(source, tmp_path / "small")), tmp_path / "other", dict[str, Any]()
    Generation.load(small).changed(GenerationOptions(height=32, width=48), "test").save(small)

    def reply(variant: Any, *given: object) -> dict[str, Any]:
        sizes[variant.name] = variant.settings
        return worker_reply(variant, *given)

    monkeypatch.setattr(bench_run, "_worker", reply)
    lines = list[str]()
    api.bench([small], baseline=source, repeats=1, progress=lambda what, *_: lines.append(what))
    assert sizes.pop("compressed") == {} and sizes
    assert all(found == {"height": 32, "width": 48} for found in sizes.values())
    assert f"original-bf16: measured at 48x32, as {small} draws" in lines
    shutil.copytree(source, other)
    with pytest.raises(InputError, match="other: found images of 64x64, expected 48x32 as those of"):
        api.bench([small, other], baseline=source)


def test_a_bench_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="found no folder"):
        api.bench([])
