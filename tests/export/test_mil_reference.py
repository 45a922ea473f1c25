"""The reference evaluator of Core ML packages: each operation against torch, its errors, rounding to half precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeprune.common.errors import ParityError
from edgeprune.export import mil_conversion
from edgeprune.export.mil_reference import OPERATIONS, Package

import coremltools as ct  # isort: skip  # after mil_conversion, which keeps it quiet
from coremltools.converters.mil import Builder as mb  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


X = torch.linspace(-2, 2, 2 * 4 * 6 * 5).reshape(2, 4, 6, 5)
W = torch.linspace(-1, 1, 3 * 2 * 3 * 3).reshape(3, 2, 3, 3)[:2]
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("conv", {"x": X, "weight": W, "strides": ints(2, 1), "pad_type": "custom", "pad": ints(1, 0, 2, 1),
              "dilations": ints(1, 1), "groups": ints(2), "bias": ints(1, 2).float()},
     F.conv2d(F.pad(X, (2, 1, 1, 0)), W, ints(1, 2).float(), (2, 1), groups=2)),
    ("constexpr_blockwise_shift_scale",
     {"data": ints(1, 2, 3, -8).reshape(2, 2), "scale": torch.tensor([[2.0], [0.5]]),
      "offset": ints(1, 0).reshape(2, 1)},
     torch.tensor([[0.0, 2.0], [1.5, -4.0]])),
    ("slice_by_index", {"x": X, "begin": ints(0, 1, 2, 1), "end": ints(0, 3, 0, 4), "stride": ints(1, 1, 3, 2),
                        "begin_mask": ints(1, 0, 0, 0), "end_mask": ints(1, 0, 1, 0), "squeeze_mask": ints(0, 0, 0, 0)},
     X[:, 1:3, 2::3, 1:4:2]),
    ("slice_by_index", {"x": X, "begin": ints(1, 0, 0, 0), "end": ints(0, 0, 0, 0), "end_mask": ints(0, 1, 1, 1),
                        "squeeze_mask": ints(1, 0, 0, 0)}, X[1]),
    ("split", {"x": X, "axis": ints(2), "split_sizes": ints(1, 5)}, X.split([1, 5], 2)),
    ("split", {"x": X, "axis": ints(1), "num_splits": ints(2)}, X.chunk(2, 1)),
    ("concat", {"values": [ints(2)[0], ints(3, 4)], "axis": ints(0), "interleave": torch.tensor(False)}, ints(2, 3, 4)),
    ("gather", {"x": X, "indices": ints(3, -1).reshape(1, 2), "axis": ints(-2)}, X[:, :, [[3, 5]]]),
    ("gather_nd", {"x": X, "indices": ints(1, 2, 0, 3).reshape(2, 2)}, X[[1, 0], [2, 3]]),
    ("batch_norm", {"x": X, "mean": X[0, :, 0, 0], "variance": X[0, :, 1, 1] ** 2, "gamma": X[1, :, 0, 0],
                    "beta": X[1, :, 2, 2], "epsilon": torch.tensor(1e-3)},
     (X - X[:1, :, :1, :1]) / (X[:1, :, 1:2, 1:2] ** 2 + 1e-3).sqrt() * X[1:, :, :1, :1] + X[1:, :, 2:3, 2:3]),
    ("layer_norm", {"x": X, "axes": ints(-1), "epsilon": torch.tensor(1e-3)}, F.layer_norm(X, (5,), eps=1e-3)),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, F.gelu(X, approximate="tanh")),
    ("gelu", {"x": X}, F.gelu(X)),
    ("matmul", {"x": X, "y": X, "transpose_y": torch.tensor(True)}, X @ X.transpose(2, 3)),
    ("scaled_dot_product_attention", {"query": X, "key": X, "value": X}, F.scaled_dot_product_attention(X, X, X)),
    ("upsample_nearest_neighbor", {"x": X, "scale_factor_height": ints(2), "scale_factor_width": torch.tensor(3.0)},
     F.interpolate(X, scale_factor=(2, 3))),
    ("abs", {"x": X}, X.abs()),
    ("reduce_max", {"x": X, "axes": ints(1, -1), "keep_dims": torch.tensor(True)}, X.amax((1, 3), keepdim=True)),
    ("reduce_mean", {"x": X, "axes": ints(1, -1), "keep_dims": torch.tensor(True)}, X.mean((1, 3), keepdim=True)),
    ("reduce_argmax", {"x": ints(1, 7, 7, 2), "axis": ints(0)}, ints(1)[0]),
    ("expand_dims", {"x": X, "axes": ints(0, -1)}, X[None, ..., None]),
    ("squeeze", {"x": X[:1, :1], "axes": ints(0, 1)}, X[0, 0]),
    ("cast", {"x": torch.tensor([1.9, -1.9]), "dtype": "int32"}, ints(1, -1)),
    ("rsqrt", {"x": X.abs(), "epsilon": torch.tensor(0.5)}, (X.abs() + 0.5).rsqrt()),
    ("transpose", {"x": X, "perm": ints(0, 3, 1, 2)}, X.permute(0, 3, 1, 2)),
    ("less", {"x": X, "y": ints(1)}, X < 1),
    ("floor_div", {"x": ints(64, 65, -1), "y": ints(32)}, ints(2, 2, -1)),
    ("tanh", {"x": X}, X.tanh()),
    ("select", {"cond": X > 0, "a": X, "b": -X}, X.abs()),
    ("pixel_shuffle", {"x": X, "upscale_factor": ints(2)}, F.pixel_shuffle(X, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "expected"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_operation(name: str, arguments: dict[str, Any], expected: Any) -> None:
    torch.testing.assert_close(OPERATIONS[name](**arguments), expected)


def saved(build: Any, path: Path) -> Path:
    program = mb.program(input_specs=[mb.TensorSpec(shape=(2, 3))], opset_version=ct.target.iOS18)(build)
    with mil_conversion.quiet():
        ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(str(path))
    return path


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    package = Package(saved(lambda x: mb.mul(x=mb.erf(x=x), y=2.0), tmp_path / "erf.mlpackage"))
    with pytest.raises(ParityError, match=r"erf\.mlpackage: MIL operation 'erf' \(erf_0"):
        package.run(None, {"x": np.ones((2, 3))})
    with pytest.raises(ParityError, match="MIL operation 'slice_by_index'"):
        values = {"x": torch.ones(2, 3)}
        op = SimpleNamespace(type="slice_by_index", inputs={}, outputs=[SimpleNamespace(name="y")])
        package._step(op, values)


def test_half_precision_rounds_after_each_operation(tmp_path: Path) -> None:
    package = Package(saved(lambda x: mb.sub(x=mb.add(x=x, y=2048.0), y=2048.0), tmp_path / "m.mlpackage"))
    x = np.full((2, 3), 0.75, np.float32)
    np.testing.assert_array_equal(package.run(None, {"x": x})[0], x)
    np.testing.assert_array_equal(package.run(None, {"x": x}, half=True)[0], np.zeros((2, 3)))
    (tmp_path / "m.mlpackage" / "Manifest.json").write_text("{}")
    with pytest.raises(ParityError, match=r"m\.mlpackage: coremltools cannot read it"):
        Package(tmp_path / "m.mlpackage")
