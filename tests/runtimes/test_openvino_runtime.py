"""OpenVINO's options become properties, also for devices that are not here; and the module's import name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import InputError

openvino = pytest.importorskip("openvino")
from openvino_fakes import FakeCore  # noqa: E402

from edgeprune.runtimes import openvino as runtime  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_a_folder_named_openvino_is_not_the_package(tmp_path: Path) -> None:
    """For example an export in the working directory, which Python takes for a namespace package."""
    (tmp_path / "openvino").mkdir()
    code = "import importlib.util as u; from edgeprune.common import extras as e; print(e.absent('openvino'))"
    for blocked, said in (("", "False"), ("sys.path[:] = [p for p in sys.path if 'site-packages' not in p];", "True")):
        code_then = f"import sys; import edgeprune.common.extras; {blocked} {code}"
        done = subprocess.run([sys.executable, "-c", code_then], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == said, done.stderr


@pytest.mark.parametrize(
    ("device", "options", "says"),
    [
        ("TPU", {}, r"device: found 'TPU', expected CPU, GPU or NPU; OpenVINO finds here: .*CPU"),
        ("GPU.9", {}, "device: found 'GPU.9'"),
        ("CPU", {"threads": -1}, "threads: found -1"),
        ("NPU", {"threads": 2}, "threads: found 2 for NPU"),
        ("CPU", {"cache_dir": __file__}, "cache_dir: .*expected a writable folder"),
    ],
)
def test_bad_options(device: str, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "core", FakeCore)
    with pytest.raises(InputError, match=says):
        runtime.settings_of(device, **options)


def test_options_become_properties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "core", FakeCore)
    monkeypatch.setattr(runtime, "usable", lambda: 5)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": 5}
    assert runtime.settings_of("CPU") == exact
    found = runtime.settings_of("CPU", threads=3, precision="int8", cache_dir=tmp_path / "a" / "b")
    cache = str(tmp_path / "a" / "b")
    assert found == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3, "CACHE_DIR": cache}
    found = runtime.settings_of("CPU", precision="int8", group_size=128)
    assert found == exact | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
    assert runtime.settings_of("CPU", precision="bf16") == exact | {"INFERENCE_PRECISION_HINT": "bf16"}
    both = {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
    assert runtime.settings_of("CPU", precision="int8-bf16", group_size=64) == exact | both
    assert runtime.settings_of("CPU", group_size=128) == exact
    assert runtime.settings_of("GPU", precision="int8", group_size=128) == {}  # it has its own
    assert (tmp_path / "a" / "b").is_dir()
    assert runtime.settings_of("GPU") == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} and runtime.settings_of("NPU") == {}


def test_precisions_are_those_of_device_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.offered("openvino") == ("int8-bf16", "int8", "bf16")
    assert runtime.offered("onnx") == runtime.offered("openvino", "GPU.1") == ("int8",)
    assert runtime.offered("openvino", "NPU") == ()
    monkeypatch.setattr(openvino, "__version__", "2026.3.1-22001-abc")  # would compute all of it in float32
    assert runtime.offered("openvino") == ("int8",)


@pytest.mark.parametrize(("version", "marked"), [("2026.4.0-1-a", "bf16"), ("2027.0", "bf16"), ("2025.2.0-2-b", "f32")])
def test_what_marks_no_angles_computes_in_float32(
    version: str, marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2026.4 what marks them does, too."""
    from openvino import opset13 as ops

    seen = []
    monkeypatch.setattr(openvino, "__version__", version)
    monkeypatch.setattr(runtime, "core", lambda: SimpleNamespace(read_model=lambda _: built))
    for angle, says, expected in ((ops.sin, False, "f32"), (ops.sin, True, marked), (ops.sqrt, False, "bf16")):
        x = ops.parameter([1], np.float32)
        built = openvino.Model([angle(x)], [x])
        if says:
            built.set_rt_info("float32", list(runtime.ANGLES))
        (tmp_path / "model.xml").touch()
        network = runtime.OpenVinoFile(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        seen.append(network._config["INFERENCE_PRECISION_HINT"] == expected)
    assert seen == [True, True, True]


@pytest.mark.parametrize("command", [["openvino.py"], ["-c", "import openvino"]])
def test_as_a_script_it_says_what_it_is(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT / "runtimes")
    assert done.returncode == 1
    assert "import this module as edgeprune.runtimes.openvino, not as" in done.stderr.splitlines()[-1]
