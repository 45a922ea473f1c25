"""`make bench-full`: rows, their forecasts, interrupted stages, committed results and the page made from them."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.bench.machine import machine
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.tensors import save_tensors
from edgeprune.experiments.full_size import __main__ as full_size
from edgeprune.experiments.full_size import forecast, measuring, recording, results
from edgeprune.experiments.full_size.forecast import Speeds, Work
from edgeprune.experiments.full_size.measuring import Stage
from edgeprune.experiments.full_size.recording import Recorder
from edgeprune.experiments.full_size.rows import rows, whole
from edgeprune.experiments.full_size.rows.row import Row
from edgeprune.families import published
from edgeprune.sampling.generation import latent_factor
from edgeprune.training.states import StateBatch, file_tensors

DOCS = Path(__file__).parents[2] / "docs"
FAST = Speeds(drawn=1e8, moved=1e9, rounded=1e8, flops=1e12, large_flops=4e12)


@pytest.fixture
def one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Leave one row, `r`, of two commands that only note their arguments, which is returned."""
    calls: list[tuple[str, ...]] = []

    def run(*arguments: str, so_far: Any = None, caches: Any = None, kill_after_s: Any = None) -> Stage:
        calls.append(arguments)
        so_far(Stage(2.0, 10))
        return Stage(2.0, 10)

    def measure(recorder: Recorder) -> None:
        recorder.stage("r: one", "one", makes=recorder.out / "made")
        recorder.stage("r: two", "two")

    row = Row("r", "two commands", Work(), 10**6, measure, model="made")
    monkeypatch.setattr(full_size, "rows", lambda: {"r": row, "s": Row("s", "", Work(), 0, measure, needs=("r",))})
    monkeypatch.setattr(full_size, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(recording, "run", run)
    monkeypatch.setattr(forecast.Speeds, "measure", lambda out: FAST)
    return calls


# ------------------------------------------------------------------------------------- rows


def test_rows_are_within_the_limits_of_a_quiet_machine() -> None:
    """By the speeds of two cores of the processor that the page was measured on."""
    quiet = Speeds(drawn=9e7, moved=5e8, rounded=3.8e7, flops=7e10, large_flops=2.5e11)
    known = rows()
    for name, row in known.items():
        assert row.name == name and row.what and 0 < row.disk_bytes <= forecast.MOST_BYTES
        assert 0 < forecast.seconds(row.work, quiet) < forecast.MOST_SECONDS, name
        assert all(known[need].model for need in row.needs)
    for name in ("synth", "analyze-gates", "plan-auto", "quantize-feedback", "compress-blocks"):
        assert name in known and f"{name}-flux" in known
    assert 100 < forecast.seconds(known["synth"].work, quiet) < 1000


def test_the_synth_row_counts_the_real_pipeline() -> None:
    known = published.networks()
    for row, name, weights in (("synth", "sd3.5-large", 8.15e9), ("synth-flux", "flux.1-dev", 11.9e9)):
        others = sum(known[n].parameters for n in published.pipelines()[name].networks.values())
        assert rows()[row].work.drawn == pytest.approx(weights + others, rel=0.005)


def test_a_row_that_is_too_long_or_too_large_is_refused(tmp_path: Path) -> None:
    assert forecast.refusal("r", 60, 10, tmp_path) is None
    assert forecast.refusal("r", 2701, 10, tmp_path) == "r: forecast 45 minutes, at most 45"
    assert forecast.refusal("r", 60, 46 * 10**9, tmp_path) == "r: writes 46.0 GB, at most 45"
    assert forecast.seconds(Work(commands=1, flops=1e12), FAST) == pytest.approx(9)


def test_speeds_are_measured(tmp_path: Path) -> None:
    speeds = Speeds.measure(tmp_path)
    assert all(value > 1e5 for value in vars(speeds).values()) and not list(tmp_path.iterdir())


def test_the_row_of_gates_is_compared_with_its_blocks_own_time(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(tiny_folders[0])
    seen = []

    def run(*arguments: str, so_far: Any, caches: None, kill_after_s: None) -> Stage:
        so_far(stage := Stage(1000.0, 10))
        return stage

    def timed(family: Any, model: Any, one: Any) -> float:
        seen.append(one)
        return 2.0

    monkeypatch.setattr(recording, "run", run)
    monkeypatch.setattr(whole, "block_by_block_s", timed)
    recorder, model = Recorder(tmp_path, "r"), whole._Model("tiny", "", 0, 0, 0, per_step=2, blocks="", calibrated=1)
    whole._gates(model, recorder)
    (latents, *_), *others = seen
    assert recorder.stages["gates: analyze"]["said"] == (
        "28 evaluations, a gradient counted as two; one takes 2.0 s by its blocks' own time, so all is 17.86 times that"
    )
    factor = latent_factor(read_json(tiny_folders[0] / "vae" / "config.json"), "")
    assert latents.shape[-2:] == (512 // factor, 512 // factor) and not others


def test_the_row_of_the_tail_trains_twice_from_the_same_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(*arguments: str, so_far: Any, caches: None, kill_after_s: None) -> Stage:
        calls.append(arguments)
        if arguments[0] == "distill":
            assert len(list((tmp_path / "tail-images").glob("*.png"))) == 8
            (cache := tmp_path / "tail" / "cache").mkdir(parents=True, exist_ok=True)
            numbers = torch.arange(8.0)[:, None]
            save_tensors(
                cache / "states-x" / "0.safetensors",
                file_tensors(StateBatch({n: numbers for n in ("image", "text", "modulation")}, numbers, numbers)),
            )
            losses = [1 / (step + 1) for step in range(20)]
            save_tensors(cache / "distill.safetensors", {}, {"meta": json.dumps({"losses": losses})})
        so_far(stage := Stage(1.0, 10))
        return stage

    monkeypatch.setattr(recording, "run", run)
    recorder = Recorder(tmp_path, "r")
    rows()["tail"].measure(recorder)
    trained = [call[call.index("--train") + 1] for call in calls if call[0] == "distill"]
    assert trained == ["all", "lora:64"] and [call[0] for call in calls] == ["compress", "distill", "distill"]
    said = recorder.stages["tail: distill, lora:64"]["said"]
    drawn = [int(torch.randint(8, (1,), generator=g)) for g in map(whole.step_generator, [0] * 20, range(20))
             if torch.randint(8, (), generator=g) is not None]  # fmt: skip
    first = {state: drawn.index(state) for state in drawn if drawn.count(state) > 1}
    last = {state: max(step for step, other in enumerate(drawn) if other == state) for state in first}
    median = statistics.median((first[state] + 1) / (last[state] + 1) for state in first)
    assert said == f"of {len(first)} states drawn again, the last loss is {median:.2f} of the first (median)"
    assert not (tmp_path / "tail").exists()
    assert whole._tail_share(whole._MODELS[0]) == pytest.approx(5 / 38)


# ------------------------------------------------------------------------------------- measuring


def test_a_command_is_measured_by_the_kernel() -> None:
    seen: list[Stage] = []
    stage = measuring.run("targets", so_far=seen.append)
    assert stage.seconds > 0.1 and stage.peak_bytes > 20_000_000 and seen[-1] == stage and stage.read_bytes is None
    with pytest.raises(SystemExit, match="edgeprune targets ended with 2"):
        measuring.run("targets", "show", "toaster")


def test_a_command_is_killed_until_it_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = measuring.run("targets", kill_after_s=0.01)
    assert stage.killed and stage.seconds < 5
    assert not measuring.run("targets", kill_after_s=300.0).killed
    whole = tmp_path / "sd3.5-large-40m"
    for name in ("transformer_int4/a.safetensors", "transformer_int4/b.safetensors", "plan.json"):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text(name)
    write_json(whole / "edgeprune.json", {"choice": {"prompts": 7}, "stages": {"plan": {}}, "files": {"plan.json": ""}})
    calls: list[float | None] = []

    def run(*arguments: str, so_far: Any, caches: None, kill_after_s: float | None) -> Stage:
        out = Path(arguments[3])
        found = read_json(out / "edgeprune.json")
        assert found["choice"] == {"prompts": 7} and not found["stages"] and not found["files"]
        calls.append(kill_after_s)
        if len(calls) == 1:
            assert [p.name for p in out.iterdir()] == ["edgeprune.json"]
        shutil.copytree(whole / "transformer_int4", out / "transformer_int4", dirs_exist_ok=True)
        (out / "plan.json").write_text("another")
        so_far(stage := Stage(4.0, 10, killed=len(calls) < 4))
        return stage

    monkeypatch.setattr(recording, "run", run)
    recorder = Recorder(tmp_path, "r")
    rows()["time-40m-killed"].measure(recorder)
    values = recorder.stages["time-40m: killed every 4 minutes"]
    assert calls == [240] * 4 and (values["seconds"], values["kills"]) == (16.0, 3)
    said = "3 times; 2 of 3 files of weights, scores, plan and images are the same; not plan.json"
    assert values["said"] == said and whole.is_dir() and not (tmp_path / "sd3.5-large-40m-killed").exists()


def test_what_a_command_read_and_wrote_is_its_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = tmp_path / "c-caches"
    caches.mkdir()

    def run(*arguments: str, so_far: Any, caches: Path, kill_after_s: None) -> Stage:
        assert arguments == ("compress", "--json") and not caches.exists()
        so_far(stage := Stage(2.0, 10, 40_460_000_000, 3_600_000_000))
        return stage

    monkeypatch.setattr(recording, "run", run)
    recorder = Recorder(tmp_path, "r")
    recorder.stage("c: compress", "compress", "--json", caches=caches)
    assert recorder.stages["c: compress"]["said"] == "40.5 GB read, 3.6 GB written"


def test_a_row_is_measured_merged_and_measured_again(
    one_row: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="s: needs a model that is not in .*; first: make bench-full ROW=r"):
        full_size.measure("s", tmp_path, fresh=False)
    with pytest.raises(SystemExit, match="ROW=x: expected one of r, s"):
        full_size.measure("x", tmp_path, fresh=False)
    (tmp_path / "made").mkdir()
    full_size.measure("r", tmp_path, fresh=False)
    assert one_row == [("one",), ("two",)] and not (tmp_path / "made").exists()
    assert "r: forecast 0 minutes" in capsys.readouterr().out
    (entry,) = results.load(tmp_path / "results.json")
    here = machine(0.0)
    assert (entry["row"], entry["cpu"].removesuffix(", float32"), entry["cores"]) == ("r", here["cpu"], here["cores"])
    assert entry["stages"]["r: two"] == {"seconds": 2.0, "peak_bytes": 10}
    full_size.measure("r", tmp_path, fresh=False)
    assert len(one_row) == 4 and len(results.load(tmp_path / "results.json")) == 1
    assert results.measured_seconds(tmp_path / "results.json", "r") == 4.0


def test_time_before_an_interruption_counts(
    one_row: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: str, so_far: Any = None, caches: Any = None, kill_after_s: Any = None) -> Stage:
        so_far(Stage(5.0, 30))
        (tmp_path / "made").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            full_size.measure("r", tmp_path, fresh=False)
    full_size.measure("r", tmp_path, fresh=False)
    (entry,) = results.load(tmp_path / "results.json")
    assert entry["stages"]["r: one"] == {"seconds": 7.0, "peak_bytes": 30}
    assert (tmp_path / "made").is_dir()  # the second attempt continued it
    assert [c[0] for c in one_row] == ["one", "two"]


# ------------------------------------------------------------------------------------- results


def test_a_processor_that_computes_in_float32_has_results_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines of one name differ in that."""
    path = tmp_path / "results.json"
    for fast, seconds in ((True, 1.0), (False, 5.0)):
        monkeypatch.setattr(results, "multiplies_bf16", lambda fast=fast: fast)
        results.merge(path, "r", {"r: one": {"seconds": seconds, "peak_bytes": 10**9}})
        assert results.measured_seconds(path, "r") == seconds
    assert [entry["cpu"].endswith(", float32") for entry in results.load(path)] == [False, True]


def test_another_processor_keeps_its_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    other = {"row": "r", "cpu": "Another", "cores": 8, "date": "2026-01-01", "version": "0", "stages": {
        "r: one": {"seconds": 1.0, "peak_bytes": 10**9, "file_bytes": 2 * 10**9, "said": "a remark"},
    }}  # fmt: skip
    write_json(path, {"schema_version": 1, "results": [other]})
    results.merge(path, "r", {"r: one": {"seconds": 3.0, "peak_bytes": 2 * 10**9}})
    results.merge(path, "r", {"r: one": {"seconds": 4.0, "peak_bytes": 2 * 10**9}})
    entries = results.load(path)
    assert len(entries) == 2 and entries[0] == other
    text = results.markdown(entries)
    assert "Another, 8 cores:" in text
    assert "| r | r: one (a remark) | 1 s | 1.00 GB | 2.00 GB | 2026-01-01 |" in text and "| 4 s |" in text
    write_json(path, {"schema_version": 2, "results": []})
    with pytest.raises(InputError, match="schema_version: found 2, expected 1"):
        results.load(path)


def test_the_page_is_made_of_the_committed_results() -> None:
    page = (DOCS / "full-size.md").read_text("utf-8")
    text = page.split("<!-- measured -->\n")[1].split("\n<!-- end -->")[0]
    assert text == results.markdown(results.load(DOCS / "full-size.json"))
    entries = read_json(DOCS / "full-size.json")["results"]
    assert {entry["row"] for entry in entries} <= rows().keys()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]) and entry["cpu"] for entry in entries)
