"""Forecasts of `compress` and `analyze`: the size that is left, and all weights that are in memory at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage_runs import OPTIONS
from tiny import tiny_pipeline

from edgeprune import api
from edgeprune.artefact.resolve import BUILTIN, read_config
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.memory import ComputeOptions
from edgeprune.planning.make import make_plan
from edgeprune.report.make import left_out
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import PLAIN
from edgeprune.stages import analyze, distill
from edgeprune.stages.compress import compress, expected_plan, forecast, preset, rehearse
from edgeprune.stages.memory import PROCESS_BYTES
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "tiny"
    tiny_pipeline(folder, t5=True)
    return folder


def weights_held(ws: Workspace) -> int:
    """Return the bytes of all different tensors of the networks that a workspace holds."""
    networks = [
        module for held in ws.original.loaded.values() for module in getattr(held, "components", {"": held}).values()
    ]
    tensors = [p for m in networks if isinstance(m, torch.nn.Module) for p in m.parameters()]
    return sum({p.data_ptr(): p.nbytes for p in tensors}.values())


def test_the_forecast_of_the_built_in_model_is_the_size_that_its_plan_leaves() -> None:
    """Its plan keeps 0.79 without projecting anything."""
    options, generation = preset("default", world=PLAIN), Generation.load(BUILTIN)
    assert options.plan.modulation_rank is None and options.plan.keep == 0.79
    numbers = forecast(BUILTIN, options, generation)
    assert 0.75 < numbers["parameters_left"] / numbers["parameters"] <= 0.79
    assert rehearse(BUILTIN, generation, options).after.parameters == numbers["parameters_left"]


def test_a_rank_that_is_measured_counts_as_the_largest_that_meets_the_budget(with_t5: Path) -> None:
    generation = Generation.load(with_t5)
    config, family = read_config(with_t5)

    def expected(keep: float, rank: int | str, protect_first: int = 0) -> int | None:
        changed = replace(OPTIONS.plan, keep=keep, modulation_rank=rank, protect_first=protect_first)
        return expected_plan(with_t5, generation, replace(OPTIONS, plan=changed)).modulation_rank

    assert expected(0.95, "auto") == 32 and expected(0.95, 4) == 4
    assert expected(0.5, "auto") == 32
    whole, at_16, at_32 = (
        make_plan(family, config, None, method="manual", modulation_rank=rank).after.parameters
        for rank in (None, 16, 32)
    )
    assert expected((at_16 + at_32) / 2 / whole, "auto", protect_first=3) == 16  # no block may go


def test_an_analysis_holds_the_transformer_alone(with_t5: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(with_t5))
    options = replace(OPTIONS, analyze=AnalyzeOptions(count=1, components=False), distill=None)
    analyze.run(ws, options.analyze)
    held = weights_held(ws)
    assert held == sum(p.nbytes for p in ws.teacher.parameters())
    assert forecast(with_t5, options, ws.generation)["analyze_memory_bytes"] - PROCESS_BYTES >= held
    assert analyze.forecast(with_t5, options.analyze, ws.generation)["weights_bytes"] >= held


def test_a_report_that_takes_hours_is_left_out(with_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = Workspace(tmp_path / "out", str(with_t5), compute=ComputeOptions("cpu", longest_s=3600.0))
    monkeypatch.setattr(Workspace, "plan", lambda _: expected_plan(with_t5, ws.generation, OPTIONS))
    assert left_out(ws) == ""
    ws.speeds = Speeds(10**4)
    assert "no report: its 16 images take at least" in left_out(ws) and "--images 1, for all:" in left_out(ws)
    assert "its 4 images" in left_out(ws, quick=True)
    ws.longest_s = None
    assert left_out(ws) == ""


def test_a_report_that_lacks_memory_is_left_out(source: Path, tmp_path: Path) -> None:
    """The artefact is whole by then: `compress` must not end with an error."""
    out, options = (
        tmp_path / "out",
        api.CompressOptions(
            plan=api.PlanOptions("manual", blocks="1"), distill=None, quantize=api.QuantizeOptions(calibration="none")
        ),
    )
    done = api.compress(source, out, options, compute=ComputeOptions("cpu", memory=6 * 10**8))
    assert done.ran == ("plan", "prune", "quantize") and done.report is None
    assert done.no_report.startswith(
        "no report: --memory: found 0.60 GB, expected at least 0.94 GB here for the report"
    )
    assert done.no_report.endswith(f"make it with more --memory: edgeprune report -o {out}")
    ws = Workspace(tmp_path / "builtin", None, compute=ComputeOptions("cpu", memory=10**6))
    assert left_out(ws).startswith("no report: --memory")


def test_training_holds_no_text_encoder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forecast counts only the transformers."""
    ws, held = Workspace(tmp_path / "out", str(source)), list[set[str]]()
    train = distill.distill
    monkeypatch.setattr(distill, "distill", lambda *a, **k: held.append({*ws.original.loaded}) or train(*a, **k))
    compress(ws, replace(OPTIONS, distill=DistillOptions(steps=1, batch=2)))
    assert held == [{"transformer"}]


def test_an_artefact_is_no_original(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "made")
    path = tmp_path / "made" / "transformer" / "config.json"
    config = read_json(path)
    write_json(path, config | {"_class_name": f"Edgeprune{config['_class_name']}"})
    generation = Generation.load(tmp_path / "made")
    with pytest.raises(InputError, match="already pruned.*; compress the original"):
        forecast(tmp_path / "made", OPTIONS, generation)
    with pytest.raises(InputError, match="already pruned"):
        analyze.forecast(tmp_path / "made", AnalyzeOptions(), generation)
