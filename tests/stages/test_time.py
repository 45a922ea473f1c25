"""How long a stage takes is said before it begins, and what takes too long is refused with what is shorter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from stage_runs import OPTIONS

from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.tables import duration
from edgeprune.residency import compute
from edgeprune.stages import analyze, options, plan, prune, quantize, workspace
from edgeprune.stages.options import AnalyzeOptions, QuantizeOptions
from edgeprune.stages.workspace import Workspace

HOUR = ComputeOptions("cpu", longest_s=3600.0)


def opened(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, given: ComputeOptions = HOUR
) -> tuple[Workspace, list[str]]:
    monkeypatch.setattr(workspace, "evaluation_seconds", lambda *_: seconds)
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
    with pytest.raises(InputError, match=r"^quantize: at least .*; --calibration none takes 0 s; --yes"):
        quantize.run(ws, QuantizeOptions(calibration="scale"))
    assert quantize.run(ws, QuantizeOptions())


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
