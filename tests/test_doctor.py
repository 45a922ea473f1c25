"""doctor: what it says is so, from package names alone."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from edgeprune import doctor, export, runtimes


def test_everything_is_examined() -> None:
    named = {f.what for f in doctor.examine()}
    assert named == {"compress"} | {f"export {f}" for f in export.FORMATS} | {f"run {r}" for r in runtimes.RUNTIMES}
    assert set(export.NEEDS) == set(export.FORMATS)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else real(n, *a))
    found = {f.what: f for f in doctor.examine()}
    assert found["compress"].works and "torch 2" in found["compress"].why
    assert not found["run ort"].works
    assert (found["run ort"].why, found["run ort"].fix) == ("missing onnxruntime", "pip install 'edgeprune[onnx]'")


def test_hardware_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes._HARDWARE, "a lever", lambda: False)
    monkeypatch.setitem(runtimes.RUNTIMES, "ort", runtimes.RuntimeInfo("onnx", ("numpy",), ("onnx",), "a lever"))
    found = {f.what: f for f in doctor.examine()}["run ort"]
    assert (found.works, found.why, found.fix) == (False, "needs a lever", "")


def test_two_onnx_runtimes_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        def __init__(self, name: str) -> None:
            self.metadata: dict[str, Any] = {"Name": name}

    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [Package("onnxruntime"), Package("numpy")])
    assert doctor.conflicts() == []
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [Package("onnxruntime"), Package("onnxruntime-GPU")])
    assert "keep one" in doctor.conflicts()[0]


def test_it_needs_no_torch() -> None:
    call = "app(['doctor', '--json'], standalone_mode=False)"
    code = f"import sys; from edgeprune.cli import app; {call}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["findings"][0]["what"] == "compress"
