"""The command line as a user sees it: help, plans without weights, and one line for every bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import run, run_here
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.runtimes import RUNTIMES
from edgeprune.shapes import PLAIN

DATA = Path(__file__).parents[1] / "samples"


def test_plan_from_published_scores_without_weights(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((DATA / "transformer_configs.json").read_text())["sd3.5-large"]))
    scores = str(DATA / "sd35_large_turbo_blocks_hpsv2.json")
    found = run("plan", "--config", str(config), "--scores", scores, "--keep", "0.79", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["blocks"] == [25, 26, 27, 28, 31, 32, 33, 34]
    assert "6,352.6 M (78.8%)" in found.stderr
    assert "--modulation-rank" not in found.stderr
    less = run("plan", "--config", str(config), "--scores", scores, "--keep", "0.7")
    assert not less.stdout  # JSON only with --json, as every command
    assert "modulation rank full; --modulation-rank auto kept more" in " ".join(less.stderr.split())


def test_every_command_asks_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them freed activations stay in the heap, and --memory is not kept."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert CliRunner().invoke(app, ["doctor", "--help"]).exit_code == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_ctrl_c_says_how_to_go_on() -> None:
    code = """if True:
        import os, signal
        from edgeprune import cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

        @cli.app.command()
        def wait():
            os.kill(os.getpid(), signal.SIGINT)

        cli.main()
    """
    found = subprocess.run([sys.executable, "-c", code, "wait"], capture_output=True, text=True)
    assert (found.returncode, found.stderr.strip()) == (130, "error: stopped; run the same command again")


@pytest.mark.parametrize(
    "verb",
    [
        *("compress", "analyze", "plan", "prune", "distill", "quantize", "export", "generate", "bench", "score"),
        "verify",
        *("study new", "study serve", "study results"),
    ],
)
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    found = run_here(*verb.split(), "--help")
    assert found.returncode == 0
    assert "Example" in found.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compress", "nowhere", "-o", "x"], "nowhere: no such folder"),
        (["compress", ".", "-o", "x"], "no model_index.json"),
        (["compress", "--max-size", "lots", "-o", "x"], "--max-size"),
        (["plan", "-o", "x", "--config", "c.json"], "exactly one of"),
        (["plan", "--config", "c.json"], "c.json: no such file"),
        (["prune", "-o", "x"], "begin with: edgeprune analyze"),
        (["export", "nowhere", "-o", "y"], "nowhere"),
        (["generate", "a red circle", "--model", "nowhere"], "nowhere"),
        (["generate", "a red circle", "--model", ".", "-o", "out.bmp"], "out.bmp"),
        (["bench", "nowhere"], "nowhere"),
        (["score", "nowhere", "--metric", "shapes"], "nowhere: no such folder"),
        (["score", ".", "--metric", "psnr"], "give --against ORIGINAL"),
        (["score", ".", "--metric", "shapes"], "found none of metadata.jsonl (images with their prompts), "),
        (["score", ".", "--metric", "clip"], "give --weights clip=PATH"),
        (["score", ".", "--metric", "geneval", "--weights", "geneval=x"], "give --weights clip=PATH"),
        (["score", ".", "--metric", "clip", "--weights", "clap=x"], "expected NAME=PATH"),
        (["analyze", "-o", "x", "--metric", "clip"], "give --weights clip=PATH"),
        (["bench", ".", "--assert", "peak~3"], "--assert"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args: list[str], words: str, tmp_path: Path) -> None:
    found = run_here(*args, cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    (line,) = [text for text in found.stderr.splitlines() if text.startswith("error:")]
    assert words in line


def test_dry_run_forecasts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline(tmp_path / "tiny")
    given = ("--data", "captions", "--protect-first", "0", "--protect-last", "1")  # of three blocks
    found = run_here("compress", "tiny", "-o", "out", "--dry-run", "--json", "--keep", "0.5", *given, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout.splitlines()[-1])
    assert data["blocks"] == 3 and data["analyze_parts"] == 1 + 3 + 5 * 3 - 1
    assert 0.2 < data["parameters_left"] / data["parameters"] <= 0.5
    from edgeprune.stages.memory import PROCESS_BYTES

    held = data["distill_memory_bytes"] - PROCESS_BYTES  # both models, and what trains one of them
    assert held > 4 * (data["parameters"] + data["parameters_left"])
    assert data["evaluation_flops"] > 2 * data["parameters"] and data["analyze_floor_s"] > 0
    # In this process, which has imported everything.
    monkeypatch.chdir(tmp_path)
    for dry in (["--dry-run"], []):
        refused = CliRunner().invoke(app, ["compress", "tiny", "-o", "out", *dry, "--max-size", "9KB"])
        assert isinstance(refused.exception, InputError) and "cannot be met" in str(refused.exception)
        assert "analyze" not in refused.output
    assert not (tmp_path / "out").exists()


def test_dry_run_of_an_analysis_times_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    found = {}
    for estimator in ("exhaustive", "reuse", "gates"):
        args = ["analyze", "tiny", "-o", "out", "--dry-run", "--json", "--joint", "--count", "5"]
        done = CliRunner().invoke(app, [*args, "--estimator", estimator])
        assert done.exit_code == 0, done.output
        found[estimator] = json.loads(done.stdout.splitlines()[-1])
    # Trajectories take a guided step between states; then the untouched model is measured.
    groups, per_score, preparing = 1 + 3 + 14 + 18 - 4, 5 * 4, 5 * (3 * 2 + 4)
    whole = found["exhaustive"]
    assert whole["groups"] == groups and whole["evaluations"] == groups * per_score + preparing
    assert whole["analysis_s"] == pytest.approx(whole["evaluations"] * whole["evaluation_s"], rel=0.05, abs=0.1)
    assert (
        found["gates"]["evaluations"]
        == 2 * per_score + preparing - per_score  # the gates compare with nothing
        < found["reuse"]["evaluations"]
        < whole["evaluations"]
    )
    streams = 4 * 64 * (64 + 16)  # float32, of 64 image and 16 text tokens of width 64
    assert [found[e]["held_bytes"] for e in ("exhaustive", "reuse")] == [0, 2 * streams * per_score]
    assert found["gates"]["held_bytes"] > 3 * streams * 16
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args", [["--config", "none.json"], ["--config", "c.json", "--scores", "none.json"], ["-o", "none"]]
)
def test_plan_looks_at_its_files_before_torch_is_imported(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    code = "import sys\nfrom edgeprune.cli import main\ntry:\n main()\nfinally:\n print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "plan", *args]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 2 and "none" in found.stderr and found.stdout.strip() == "False", found


def test_a_bad_size_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline(tmp_path / "tiny")
    (tmp_path / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    for side in ("height", "width"):
        found = run("generate", "a red circle", "--model", "tiny", f"--{side}", "63", cwd=tmp_path)
        assert found.returncode == 2 and f"{side}: found 63, expected a multiple of 8" in found.stderr


@pytest.mark.skipif(RUNTIMES["trt"].has_hardware(), reason="a machine without a GPU is wanted")
def test_bench_of_all_leaves_out_what_cannot_run_here(tmp_path: Path) -> None:
    for name, target in (("engines", "trt"), ("ir", "onnx")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "edgeprune_export.json").write_text(json.dumps({"target": target, "source": "nowhere"}))
    found = run("bench", "engines", "--runtime", "all", cwd=tmp_path)
    assert found.returncode == 2 and "error: engines: found a folder for trt, none of which runs here" in found.stderr
    found = run("bench", "engines", "ir", "--runtime", "all", cwd=tmp_path)  # goes on to the model that is not there
    assert "left out: engines: found a folder for trt" in found.stderr and "error: nowhere" in found.stderr


@pytest.mark.parametrize(
    ("key", "value", "row"),
    [
        ("int4_bytes", 3_576_100_000, ("int4", "3.58 GB")),
        ("distill_floor_s", 90, ("distill floor", "1.5 minutes")),
        ("data_floor_s", 1.2e6, ("data floor", "20,000 minutes")),
        ("evaluation_flops", 6.4e12, ("evaluation", "6.4 TFLOP")),
        ("matmul_flops_per_s", 123_456_789_012, ("matmul", "0.123 TFLOP/s")),
        ("parameters_left", 6_352_600_000, ("parameters left", "6,352,600,000")),
    ],
)
def test_a_forecast_has_units_for_people(key: str, value: float, row: tuple[str, str]) -> None:
    from edgeprune.cli.screen import in_units

    assert in_units(key, value) == row


def test_version_and_targets() -> None:
    assert run("--version").stdout.startswith("edgeprune 0.")
    assert "cpu-x86" in run("targets").stderr


def test_plan_options_begin_from_the_preset() -> None:
    from edgeprune.cli.options import plan_options
    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages.compress import preset

    start = preset("default", world=PLAIN).plan

    def made(**options: Any) -> PlanOptions:
        return plan_options(start, **options, prompts="prompts.txt")

    assert made() == start and start.method == "hybrid"  # `plan` after `compress` has nothing to do
    assert (made(keep=0.9).method, made(keep=0.9).keep) == ("hybrid", 0.9)
    assert made(method="hybrid") == start and start.modulation_rank is None
    assert made(method="hpp") == PlanOptions("hpp", keep=start.keep)
    assert made(method="koala") == PlanOptions("koala", keep=start.keep)
    assert (made(blocks="3").method, made(blocks="3").keep) == ("manual", None)
    assert (made(fit="rtx").keep, made(max_size="3GB").max_size_bytes) == (None, 3 * 10**9)
    assert made(threshold=0.3, protect_last=1).protect_first == start.protect_first
    assert made(modulation_rank="full") == start
    thin = made(modulation_rank="auto", method="manual")
    assert (thin.modulation_rank, thin.prompts, thin.keep) == ("auto", "prompts.txt", None)
