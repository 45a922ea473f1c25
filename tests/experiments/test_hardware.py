"""`make check-gpu` and `make check-mac`: every check on a second device that computes; workers, results and pages."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from second_device import MISSING, NAME, second_device
from trt_fakes import FakeCuda

from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json, write_json
from edgeprune.experiments.hardware import __main__ as hardware
from edgeprune.experiments.hardware import registry, results, running
from edgeprune.experiments.hardware.checks import apple
from edgeprune.experiments.hardware.place import SMALL, Place
from edgeprune.experiments.hardware.registry import Check, checks
from edgeprune.experiments.hardware.running import attempt
from edgeprune.report import steps
from edgeprune.runtimes.coreml import COMPUTE_UNITS
from edgeprune.runtimes.gpu import Gpu
from edgeprune.stages import encoders, quantize

DOCS = Path(__file__).parents[2] / "docs"
ALL = checks("gpu") | checks("mac")
NOT_HERE = {
    "nvml": "NVML",
    **dict.fromkeys(("tensorrt", "tensorrt-streams"), "neither tensorrt nor tensorrt_rtx"),
    "int4-kernel": "no such kernel",
    "onnx-providers": "has neither provider",
    "coreml-export": "macOS only",
    **{f"coreml-{units}": "no export" for units in ("all", "cpu", "gpu", "ne")},
    "footprint": "only macOS",
}

COSTLY = ("feedback", "report", "gates-flux", "tail", "modulation", "velocities", "distillation", "lora", "vae")
"""Checks of stages; others try the same parts of the code on the second device, and so do the tests of residency."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The second device, with large models that are small, and no difference from the processor."""
    kinds = {"sd3.5-large": "sd3", "flux.1-dev": "flux"}
    scratch = tmp_path_factory.mktemp("hardware")
    with second_device() as device:
        yield Place(device.device, scratch, pixels=64, shorten=lambda name: SMALL[kinds[name]], within=1e-5)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what takes cuda take the second device, and let it be short."""
    monkeypatch.setattr("edgeprune.residency.compute.gc", SimpleNamespace(collect=lambda: 0))  # takes most of the time
    monkeypatch.setattr("edgeprune.residency.compute._here", lambda: {NAME: 1, "cpu": 1})
    monkeypatch.setattr("edgeprune.stages.costs.matmul_flops_per_s", lambda **_: 1e12)
    monkeypatch.setattr(
        "edgeprune.experiments.hardware.checks.blocks.best_seconds", lambda work, *_: work() is None or 1.0
    )
    monkeypatch.setattr(steps, "LEAST", 1)
    monkeypatch.setattr(steps, "MOST", 1)
    monkeypatch.setattr(quantize, "PROMPTS", 2)
    monkeypatch.setattr(encoders, "PROMPTS", 2)
    monkeypatch.setattr("edgeprune.runtimes.gpu.open_gpu", lambda extra: Gpu(FakeCuda()))
    monkeypatch.setattr("edgeprune.runtimes.trt.first_vendor", lambda: None)


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in COSTLY else ()) for n in ALL])
def test_checks_on_a_second_device(name: str, place: Place, fakes: None) -> None:
    result = attempt(ALL[name], place)
    expected = ("left out", NOT_HERE[name]) if name in NOT_HERE else ("ok", "")
    assert result["outcome"] == expected[0] and expected[1].lower() in result["figure"].lower(), result
    assert result["figure"] and "\n" not in result["figure"] and json.dumps(result)


def test_what_fails_is_said_in_a_line_and_what_is_missing_is_left_out(tmp_path: Path) -> None:
    def broken(place: Place) -> str:
        raise RuntimeError("a kernel\nis missing")

    def without(name: str, place: Place) -> str:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    here = Place(torch.device("cpu"), tmp_path)
    for name, outcome in (("psutil", "left out"), ("edgeprune.nowhere", "failed")):
        assert attempt(Check("a", "b", partial(without, name), 9), here)["outcome"] == outcome
    assert attempt(Check("a", "b", broken, 9), here)["figure"] == "RuntimeError: a kernel is missing"
    found = attempt(Check("a", "b", broken, 9, needs=("json", "no_such_vendor")), here)
    assert found["outcome"] == "left out" and found["figure"].startswith("no_such_vendor: ModuleNotFoundError")


def test_every_check_says_what_it_tries() -> None:
    assert all(one.what and one.run.__doc__ and 0 < one.seconds <= 240 for one in ALL.values())


WORKER = """
import json, os, sys, time
names = sys.argv[sys.argv.index("--worker") + 2:]
for name in names:
    print(json.dumps({"begins": name}), flush=True)
    if name == "device": os._exit(9)
    if name == "attention": time.sleep(60)
    result = {"name": name, "what": "", "outcome": "ok", "figure": "f", "seconds": 0.1}
    if name == "vae": result |= {"outcome": "failed", "figure": "x: CUDA error: an illegal access"}
    print(json.dumps(result), flush=True)
    if name == "vae": break
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies, hangs and meets a CUDA error."""
    (tmp_path / "worker.py").write_text(WORKER)
    real = running.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([command[0], str(tmp_path / "worker.py"), *command[3:]], **options)

    monkeypatch.setattr(running.subprocess, "Popen", start)
    known = {name: dataclasses.replace(one, seconds=2 if name == "attention" else 60) for name, one in ALL.items()}
    monkeypatch.setattr(running, "checks", lambda kind: known)


def test_a_worker_that_dies_or_hangs_is_replaced(stand_in: None) -> None:
    names = ["memory-figures", "device", "attention", "vae", "nvml"]
    found = {result["name"]: result for result in running.run_all("gpu", names)}
    assert list(found) == names
    assert [found[n]["outcome"] for n in names] == ["ok", "failed", "failed", "failed", "ok"]
    assert found["device"]["figure"] == "its process ended with 9"
    assert found["attention"]["figure"] == "took more than 2 s" and "CUDA error" in found["vae"]["figure"]


def test_all_ends_in_time(stand_in: None) -> None:
    found = list(running.run_all("gpu", ["attention", "nvml"], most_seconds=running._AFTER + 1))
    assert [result["outcome"] for result in found] == ["left out", "left out"]
    assert all(result["figure"] == "no time was left" for result in found)


def test_results_of_each_device_are_merged_and_shown(tmp_path: Path) -> None:
    path, about = tmp_path / "gpu.json", {"device": "A card", "driver": "driver 1", "versions": {"torch": "2"}}
    one = {"name": "vae", "what": "the VAE", "outcome": "ok", "figure": "1e-3 | f", "seconds": 2.0}
    results.merge(path, about, [one, one | {"name": "nvml", "outcome": "left out", "figure": "pynvml: none"}])
    results.merge(path, about | {"device": "Another"}, [one])
    results.merge(path, about, [one | {"outcome": "failed", "figure": "bad"}])
    first, other = results.load(path)
    assert [r["name"] for r in first["checks"]] == ["vae", "nvml"] and other["device"] == "Another"
    text = results.markdown("gpu", [first, other])
    assert "## A card\n\ndriver 1; " in text and "- `nvml`: pynvml: none" in text
    assert "| vae | the VAE | failed | bad | 2.0 s |" in text and "1e-3 / f" in text
    write_json(path, {"schema_version": 2, "results": []})
    with pytest.raises(InputError, match="schema_version: found 2, expected 1"):
        results.load(path)


@pytest.mark.parametrize("kind", registry.MODULES)
def test_the_page_is_made_of_the_committed_results(kind: str) -> None:
    page = (DOCS / f"{kind}.md").read_text("utf-8")
    text = page.split("<!-- measured -->\n")[1].split("\n<!-- end -->")[0]
    assert text == results.markdown(kind, results.load(DOCS / f"{kind}.json"))


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("# GPU\n<!-- measured -->\nold\n<!-- end -->\n")
    made = [{"name": "vae", "what": "the VAE", "outcome": o, "figure": "f", "seconds": 1.0} for o in ("ok", "failed")]
    monkeypatch.setattr(running, "run_all", lambda kind, names: iter(made[: len(names)]))
    monkeypatch.setattr(results, "machine", lambda kind: {"device": "Card", "driver": "1", "versions": {}})
    assert hardware.run("gpu", ["vae"], page) == 0 and hardware.run("gpu", ["vae", "vae"], page) == 1
    assert "## Card" in page.read_text() and "old" not in page.read_text()
    assert read_json(page.with_suffix(".json"))["results"][0]["checks"][0]["outcome"] == "failed"
    assert "1 right, 1 failed, 0 left out" in capsys.readouterr().out


def test_without_the_hardware_one_line_says_so() -> None:
    """Also in a checkout that is not installed: `edgeprune.runtimes` is a folder beside the package."""
    command = [sys.executable, "-m", "edgeprune.experiments.hardware"]
    listed = subprocess.run([*command, "mac", "--list"], capture_output=True, text=True, cwd=DOCS.parent)
    assert listed.returncode == 0 and "coreml-export" in listed.stdout
    nothing = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # also on a machine that has one
    done = subprocess.run([*command, "gpu"], capture_output=True, text=True, cwd=DOCS.parent, env=nothing)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "torch finds no CUDA" in done.stderr


def test_core_ml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks, with an export and a runtime that stand in."""
    here, record = Place(torch.device("cpu"), tmp_path), {"parity": {"vae_decoder": {"max": 0.001}}}
    here._made["sd3"] = tmp_path / "sd3"

    def export(model: Path, out: Path, target: str, *, device: str) -> Any:
        out.mkdir()
        return SimpleNamespace(record=record)

    times = SimpleNamespace(backend=SimpleNamespace(times={"vae": {"compile_s": 1.0, "specialise_s": 2.0}}))
    asked = []

    def drawn(*_: Any, compute_units: str, **__: Any) -> Any:
        asked.append(compute_units)
        return 40.0, times

    monkeypatch.setattr("edgeprune.api.export", export)
    monkeypatch.setattr(apple, "_predicts", lambda: True)
    monkeypatch.setattr(
        apple, "compare_image", lambda *_, **options: asked.append(options["compute_units"]) or (40, times)
    )
    found = [attempt(one, here) for name, one in checks("mac").items() if name.startswith("coreml")]
    assert [result["outcome"] for result in found] == ["ok"] * 5 and "vae_decoder" in found[0]["figure"]
    assert "specialised in 2.0 s" in found[1]["figure"] and sorted(asked) == sorted(COMPUTE_UNITS)
