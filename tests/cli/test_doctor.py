"""`edgeprune doctor`: what it finds from package names alone."""

import importlib.util
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from edgeprune import export, runtimes
from edgeprune.cli import app, doctor
from edgeprune.common import extras


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
    """doctor reports it; generate and bench do so where they use ONNX Runtime."""
    here = {"onnxruntime"}

    def version(name: str) -> str:
        if name not in here:
            raise extras.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(extras.metadata, "version", version)
    assert extras.conflicts() == []
    here.add("onnxruntime-gpu")
    (said,) = extras.conflicts()
    assert "keep one: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edgeprune[onnx-gpu]'" in said
    monkeypatch.setattr(runtimes, "choose", lambda folder, runtime: runtime)
    for arguments, told in (
        (["doctor"], True),
        (["generate", "x", "--model", "nowhere", "--runtime", "ort"], True),
        (["generate", "x", "--model", "nowhere", "--runtime", "openvino"], False),
        (["bench", "nowhere", "--runtime", "ort"], True),
    ):
        result = CliRunner().invoke(app, arguments)
        assert ("keep one" in " ".join(result.stderr.split())) is told, arguments


def test_it_needs_no_torch() -> None:
    call = "app(['doctor', '--json'], standalone_mode=False)"
    code = f"import sys; from edgeprune.cli import app; {call}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["findings"][0]["what"] == "compress"


def test_a_package_below_its_floor_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the requirements of the installed edgeprune: those of the base install, of the extra, and of its variants."""
    needs = ["rich>=13.5.2", 'torch<4,>=2.7; extra == "compress"', 'edgeprune[compress]; extra == "train"']
    needs += ['openvino>=2025.4; extra == "openvino"', 'onnxruntime-gpu>=1.21; extra == "onnx-gpu"']
    here = {"rich": "13.5.2", "torch": "2.6.0+cpu", "openvino": "2025.4.0", "onnxruntime-gpu": "1.20.1"}

    def version(name: str) -> str:
        if name not in here:
            raise extras.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(extras.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(extras.metadata, "version", version)
    assert extras.outdated("compress,openvino") == ["torch>=2.7"]
    assert extras.outdated("onnx") == ["onnxruntime-gpu>=1.21"]
    here |= {"torch": "2.7", "rich": "13.5", "onnxruntime-gpu": "1.21.0rc1"}
    assert extras.outdated("compress,onnx") == ["rich>=13.5.2"]
    found = {f.what: f for f in doctor.examine()}["run ort"]
    assert (found.works, found.why) == (False, "too old: rich 13.5 (needs 13.5.2)")
    assert found.fix == "pip install 'rich>=13.5.2'"
