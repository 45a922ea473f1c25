"""How long a stage takes is said before it begins, and what takes too long is refused with what is shorter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import OPTIONS
from tiny import tiny_flux_pipeline
from typer.testing import CliRunner

from edgeprune.artefact.resolve import read_original
from edgeprune.cli import app
from edgeprune.cli.limits import compute_options
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.tables import duration, parse_duration
from edgeprune.metrics import evaluations, preparing
from edgeprune.metrics.velocity import VelocityError
from edgeprune.report import make
from edgeprune.residency import compute
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.solvers import SOLVERS
from edgeprune.stages import analyze, calibration, distill, options, plan, prune, quantize, work, workspace
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, QuantizeOptions
from edgeprune.stages.original import Original
from edgeprune.stages.work import Speeds, Subject, drawing, encoding, reporting
from edgeprune.stages.workspace import Workspace

HOUR = ComputeOptions("cpu", longest_s=3600.0)


def opened(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, given: ComputeOptions = HOUR
) -> tuple[Workspace, list[str]]:
    monkeypatch.setattr(workspace, "least", lambda *_: Speeds(seconds))
    return Workspace(tmp_path / "out", str(source), compute=given), []


def test_times_as_people_say_them() -> None:
    assert [duration(s) for s in (4, 89, 100, 3600, 5400, 40_000, 10**6)] == [
        "4 s", "89 s", "2 min", "60 min", "1.5 hours", "11 hours", "12 days",
    ]  # fmt: skip


def test_a_long_stage_is_said_before_it_begins(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, lines = opened(source, tmp_path, monkeypatch, 1.0)
    analyze.run(ws, replace(OPTIONS.analyze, components=False), lambda what, *_: lines.append(what))
    assert lines[0].startswith("analyze: at least") and "evaluations of the transformer" in lines[0]
    ws, lines = opened(source, tmp_path / "quick", monkeypatch, 1e-6)
    analyze.run(ws, replace(OPTIONS.analyze, components=False), lambda what, *_: lines.append(what))
    assert not any("at least" in line for line in lines)


def test_what_takes_too_long_is_refused_with_what_does_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, estimator, shorter in (
        (30.0, "exhaustive", r"--estimator gates takes \d+ min; "),
        (100.0, "exhaustive", r"--estimator gates --count 1 takes \d+ min; "),
        (100.0, "gates", r"--count 1 takes \d+ min; "),
    ):
        ws, _ = opened(source, tmp_path / f"{seconds}{estimator}", monkeypatch, seconds)
        with pytest.raises(InputError, match=rf"^analyze: at least .* here, on cpu; {shorter}--yes runs it anyway$"):
            analyze.run(ws, AnalyzeOptions(count=3, estimator=estimator))
        assert "analyze" not in ws.manifest.stages and not ws.report_path.exists()
    ws, _ = opened(source, tmp_path / "yes", monkeypatch, 100.0, ComputeOptions("cpu"))
    once = AnalyzeOptions(count=2, estimator="gates", components=False)
    assert analyze.run(ws, once)
    again = Workspace(ws.out, str(source), compute=HOUR, fresh=True)
    assert not analyze.run(again, once)  # it is done, however long it took
    with pytest.raises(InputError, match="--yes"):
        analyze.run(again, replace(once, count=3))
    assert "analyze" in again.manifest.stages and again.report_path.exists()  # refused before anything is dropped


def test_calibration_counts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, _ = opened(source, tmp_path, monkeypatch, 100.0)
    plan.run(ws, replace(OPTIONS.plan, method="manual", keep=None, blocks="1"))
    prune.run(ws)
    with pytest.raises(InputError, match=r"^quantize: at least .*; --count 1 takes 28 min; --yes"):
        quantize.run(ws, QuantizeOptions(calibration="feedback"))
    with pytest.raises(InputError, match=r"^--count: excludes --calibration none; omit one$"):
        quantize.run(ws, QuantizeOptions(calibration="none", count=1))
    ws.speeds = Speeds(10**4)
    with pytest.raises(InputError, match=r"^quantize: at least .*; --calibration none takes 0 s; --yes"):
        quantize.run(ws, QuantizeOptions(calibration="feedback", count=1))
    assert quantize.run(ws, QuantizeOptions(calibration="none"))


def test_fewer_samples_calibrate_and_are_scored_when_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()
    real = calibration.VelocityError.__init__

    def noted(self: VelocityError, *args: Any, **given: Any) -> None:
        real(self, *args, **given)
        seen.append(len(self.states))

    monkeypatch.setattr(VelocityError, "__init__", noted)
    ws = Workspace(tmp_path / "out", str(source))
    analyze.run(ws, AnalyzeOptions(count=2, states=3, components=False))
    plan.run(ws, replace(OPTIONS.plan, method="manual", keep=None, blocks="1"))
    prune.run(ws)
    quantize.run(ws, QuantizeOptions(calibration="feedback", count=1, states=2))
    assert seen == [6, 2]
    with pytest.raises(InputError, match="^--states works with --metric velocity only, found psnr"):
        AnalyzeOptions(metric="psnr", states=2).chosen(ws.family, ws.config)


def test_options_that_are_not_set_change_no_digest() -> None:
    """Folders that were made before there were such options stay current."""
    assert QuantizeOptions().to_json() == {"group_size": 64, "calibration": "auto"}
    assert "states" not in AnalyzeOptions().to_json() and "states" in AnalyzeOptions(states=2).to_json()
    assert CompressOptions().to_json()["quantize"] == QuantizeOptions().to_json()


def test_a_time_is_read_or_refused() -> None:
    assert [parse_duration(t, "--time") for t in ("90s", "40m", "40 min", "1.5h", "2d")] == [
        90, 2400, 2400, 5400, 172_800,
    ]  # fmt: skip
    for text in ("", "40", "0m", "-1h", "1e3s", "40 minutes", "inf h"):
        with pytest.raises(InputError, match=r"^--time: found '.*', expected a time such as 90s, 40m or 2h$"):
            parse_duration(text, "--time")
    assert compute_options("auto", None, yes=False, longest="2h").longest_s == 7200
    assert compute_options("auto", None, yes=False).longest_s == 3600
    with pytest.raises(InputError, match="--yes runs what takes any time; omit --time"):
        compute_options("auto", None, yes=True, longest="2h")


def test_training_and_the_report_are_refused_too(copy: Path, source: Path) -> None:
    ws = Workspace(copy, str(source), compute=HOUR, fresh=True)
    ws.speeds = Speeds(60.0)
    assert OPTIONS.distill is not None
    with pytest.raises(InputError, match=r"^distill: at least .* here, on cpu; --steps 12 takes .*; --yes"):
        distill.run(ws, replace(OPTIONS.distill, steps=100), OPTIONS.data)
    assert "distill" in ws.manifest.stages
    ws.speeds = Speeds(0.1)
    with pytest.raises(InputError, match=r"^report: at least .* here, on cpu; --images 2000 takes .*; --yes"):
        make.make_report(ws, images=16_000)
    assert make.make_report(ws)["images"] == 2  # nothing is measured again


def test_each_stage_of_a_large_model_says_what_it_takes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "is_small", lambda numbers: False)
    monkeypatch.setattr(workspace, "least", lambda *_: Speeds(1e-3, 1e9, 1e6, 1e6))
    ws, lines = Workspace(tmp_path / "out", str(source), compute=ComputeOptions("cpu", 10**10)), list[str]()
    options = replace(OPTIONS.plan, method="manual", keep=None, blocks="1", modulation_rank=4)
    plan.run(ws, options, progress=lambda what, *_: lines.append(what))
    prune.run(ws, lambda what, *_: lines.append(what))
    quantize.run(ws, QuantizeOptions(calibration="feedback", count=1, states=1), lambda what, *_: lines.append(what))
    said = [line for line in lines if "at least" in line]
    assert [line.partition(":")[0] for line in said] == ["plan", "prune", "quantize"]
    assert "here, on cpu" in said[1] and "writes 0.00 GB" in said[1]
    assert "in at most 10.00 GB of memory, writes 0.00 GB, " in said[2] and said[2].endswith("of the transformer")


def test_a_plan_is_refused_where_its_prompts_take_too_long(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "least", lambda *_: Speeds(1e-3, flops=1.0))
    out = tmp_path / "out"
    Workspace(out, str(source))
    words = ["plan", "-o", str(out), "--blocks", "1", "--device", "cpu", "--modulation-rank", "4"]
    for more in ([], ["--time", "2h"]):
        refused = CliRunner().invoke(app, [*words, *more])
        assert isinstance(refused.exception, InputError), refused.output
        why = str(refused.exception)
        assert why.startswith("plan: at least") and "; --modulation-rank full takes 0 s; --yes runs it anyway" in why
    assert not (out / "plan.json").exists()
    assert CliRunner().invoke(app, [*words, "--yes"]).exit_code == 0 and (out / "plan.json").is_file()


def test_the_disk_is_timed_without_a_file_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside a folder that cannot be written to: a dry run goes on."""
    monkeypatch.setattr(work, "_SAMPLE_BYTES", 1000)
    mine = tmp_path / "speed.tmp"
    mine.write_text("mine")
    assert work.bytes_moved_per_s(tmp_path) > 0
    assert list(tmp_path.iterdir()) == [mine] and mine.read_text() == "mine"
    assert work.bytes_moved_per_s(mine / "below") > 0  # refused by every system, even to root


def test_work_is_counted_from_shapes(source: Path) -> None:
    config, family = read_original(source)
    subject = Subject(source, family, config, Generation(4, 7.0, 64, 64, 6))
    one, two = drawing(subject, 1), drawing(subject, 2)
    assert (one.evaluations, two.evaluations) == (4 * 2, 2 * 4 * 2) and two.flops > one.flops > 0
    assert encoding(subject, 0).flops == 0 < encoding(subject, 1, pooled=True).flops <= encoding(subject, 1).flops
    assert reporting(subject, 1, 0.5, 4 * 2).evaluations == (4 * 2 + 2) * 1.5
    assert reporting(subject, 1, 0.5, 4).evaluations == 4 * 2 + 2 + (4 + 2) * 0.5
    assert Speeds(2.0, 10.0, 5.0, 4.0).seconds(work.Work(1, 10, 10, 4)) == 2 + 1 + 2 + 1


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_step_without_guidance_counts_once(solver: str, source: Path) -> None:
    """The levels are the scheduler's, so the count is that of what is drawn."""
    config, family = read_original(source)
    plain = Subject(source, family, config, Generation(6, 7.0, 64, 64, 6, solver))
    ranged = replace(plain, generation=replace(plain.generation, guidance_range=(0.5, 1.0)))
    pipe, rows = Original(source).pipe, list[int]()
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    for subject, counts in ((plain, {2}), (ranged, {1, 2})):
        rows.clear()
        generate(pipe, ["a"], [1], subject.generation)
        assert subject.by_step(6) == rows and set(rows) == counts
        assert drawing(subject, 3).evaluations == 3 * sum(rows)
    handle.remove()
    assert reporting(ranged, 1, 1.0, ranged.per_image).evaluations == 2 * (ranged.per_image + 2)
    assert evaluations("psnr", ranged.generation, 5, ranged.by_step) == 5 * ranged.per_image
    six = replace(ranged, generation=replace(ranged.generation, num_inference_steps=12))
    assert preparing("velocity", six.generation, 5, six.by_step) == 5 * sum(ranged.by_step(6)[:-1])


def test_blocks_of_each_kind_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed model is timed by one block of each kind, as often as there are such blocks."""
    tiny_flux_pipeline(tmp_path / "flux")
    ws = Workspace(tmp_path / "out", str(tmp_path / "flux"), compute=ComputeOptions("cpu", 10**11))
    runs, kinds = list[str](), {k: len(v) for k, v in ws.family.kinds(ws.config).items()}
    monkeypatch.setattr(work, "fastest", lambda run, *_: runs.append(run()) or 2.0)
    speeds = work.measured(ws.subject, ws.original.stored, ws.original.compute, tmp_path)
    assert speeds.evaluation_s == 2.0 * sum(kinds.values()) and len(kinds) == 2


def test_the_estimator_is_the_one_that_is_right_for_the_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    chosen = AnalyzeOptions().chosen(ws.family, ws.config)
    assert chosen.estimator == "exhaustive"
    monkeypatch.setattr(options, "is_small", lambda numbers: False)
    assert AnalyzeOptions().chosen(ws.family, ws.config).estimator == "gates"
    assert AnalyzeOptions(metric="psnr").chosen(ws.family, ws.config).estimator == "exhaustive"
    assert AnalyzeOptions(estimator="reuse").chosen(ws.family, ws.config).estimator == "reuse"
    assert compute.is_small(250_000_000) and not compute.is_small(250_000_001)
