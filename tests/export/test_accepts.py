"""The export checks what a device takes before any work starts."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeprune import export, targets
from edgeprune.common.errors import InputError
from edgeprune.export import accepts

NPU = targets.load("intel-npu")


def artefact(path: Path, *, wide: int, group: int, more: str = "bias") -> Path:
    """Write a transformer_int4 with one 4-bit and one 8-bit layer, and nothing else."""
    tensors = {
        "a.weight_packed": np.zeros((4, wide // 2), np.uint8), "a.weight_scale": np.zeros((4, wide // group), np.half),
        "b.weight_packed": np.zeros((4, 48), np.uint8), "b.weight_scale": np.zeros((4, 1), np.half),
        f"b.{more}": np.zeros(4, np.half),
    }  # fmt: skip
    (path / "transformer_int4").mkdir(parents=True)
    save_file(tensors, path / "transformer_int4" / "diffusion_pytorch_model.safetensors")
    return path


@pytest.mark.parametrize("fmt", export.FORMATS)
def test_a_group_that_the_device_does_not_take(fmt: str, tmp_path: Path) -> None:
    source, device = artefact(tmp_path / "32", wide=96, group=32), dataclasses.replace(NPU, name="it")
    with pytest.raises(InputError, match=r"a: group size: found 32, expected one of 64, 128, which it takes"):
        export.export(source, tmp_path / "out", fmt, device, progress=pytest.fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["32"]


def test_what_is_taken(tmp_path: Path) -> None:
    source = artefact(tmp_path / "32", wide=96, group=32)
    assert accepts.group_sizes(source / "transformer_int4") == {32: "a"}
    accepts.check(source, targets.load("cpu-x86"))
    accepts.check(artefact(tmp_path / "64", wide=128, group=64), NPU)
    accepts.check(tmp_path / "absent", NPU)  # `pipeline` refuses it


def test_a_folder_that_is_no_pipeline_is_refused_before_heavy_imports(tmp_path: Path) -> None:
    for model in ("absent", "."):
        code = f"""
import sys
from pathlib import Path
from edgeprune import export, targets
try:
    export.export(Path({str(tmp_path / model)!r}), None, "trt", targets.load("rtx"), progress=None)
except Exception as error:
    print(error)
assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert ("no such folder" if model == "absent" else "no model_index.json") in run.stdout


def test_no_int4_no_zero_points_no_damage(tmp_path: Path) -> None:
    source = artefact(tmp_path / "a", wide=128, group=64)
    with pytest.raises(InputError, match="found INT4 weights, expected float16"):
        accepts.check(source, dataclasses.replace(NPU, dtypes=("float16",)))
    asymmetric = artefact(tmp_path / "b", wide=128, group=64, more="weight_zero_point")
    with pytest.raises(InputError, match=r"b.weight_zero_point: found zero points \(asymmetric"):
        accepts.check(asymmetric, NPU)
    (path,) = (source / "transformer_int4").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=r"safetensors: cannot be read"):
        accepts.check(source, NPU)
