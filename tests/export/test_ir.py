"""IR saved weight by weight: what OpenVINO reads from it is what its own `save_model` writes, in less memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeprune.export import ir

openvino = pytest.importorskip("openvino")

CONVERTED = """
import re, sys
from pathlib import Path
from edgeprune.export import to_openvino
from edgeprune.runtimes import openvino
openvino.core()
to_openvino.Compiled = lambda path: None  # it is not compared here
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
to_openvino.converted(Path(sys.argv[1]))
print(peak() - before)
"""


def model() -> Any:
    """A model of integers of four and eight bits, half and single precision, and an angle."""
    from openvino import opset13 as ops

    draw = np.random.default_rng(0)
    x = ops.parameter([-1, 8], np.float32, name="x")
    packed = openvino.Tensor(draw.integers(0, 256, 32, np.uint8), openvino.Shape([8, 8]), openvino.Type.i4)
    weights = (
        ops.constant(packed, name="int4"), ops.constant(draw.integers(-128, 128, (8, 8), np.int8), name="int8"),
        ops.constant(draw.normal(size=(8, 8)).astype(np.float16), name="half"),
        ops.constant(draw.normal(size=(8, 8)).astype(np.float32), name="single"),
    )  # fmt: skip
    y: Any = x
    for weight in weights:
        y = ops.matmul(y, ops.convert(weight, "f32"), False, True)
    angle = ops.sin(y, name="angle")
    return openvino.Model([ops.add(angle, ops.constant(np.float32(1), name="one"))], [x], "m")


def constants(model: Any) -> dict[str, tuple[Any, ...]]:
    return {
        node.get_friendly_name(): (str(node.get_element_type()), tuple(node.get_output_shape(0)), node.data.tobytes())
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
    }


def test_weights_are_what_openvino_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir, "_LARGE", 32)
    whole, apart = tmp_path / "whole.xml", tmp_path / "apart.xml"
    openvino.save_model(model(), whole, compress_to_fp16=False)
    ir.save(model(), apart, precise={"angle"}, source=tmp_path / "none")
    core = openvino.Core()
    expected, found = core.read_model(whole), core.read_model(apart)
    assert constants(found) == constants(expected) and len(constants(found)) == 5
    assert [port.get_any_name() for port in found.inputs] == [port.get_any_name() for port in expected.inputs]
    given = np.ones((3, 8), np.float32)
    one, other = (openvino.compile_model(m, "CPU")([given])[0] for m in (expected, found))
    np.testing.assert_array_equal(one, other)
    layers = {layer.attrib["name"]: layer for layer in ElementTree.parse(apart).iterfind("layers/layer")}
    marked = [name for name, layer in layers.items() if layer.find("rt_info/attribute[@name='precise']") is not None]
    assert marked == ["angle"]
    data = [layers[name].find("data") for name in ("int4", "int8", "half", "single")]
    places = [int(one.attrib["offset"]) for one in data if one is not None]
    assert all(place % 64 == 0 for place in places) and len(set(places)) == 4


@pytest.mark.slow  # it converts 256 MB
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak")
def test_a_conversion_holds_few_weights(tmp_path: Path) -> None:
    """Sixteen matrices of 16 MB, which are read through a mapping and copied."""
    import onnx

    side, count = 2048, 16
    draw = np.random.default_rng(0)
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", side]) for n in "xy"]
    tensors, nodes, last = [], [], "x"
    for index in range(count):
        values = draw.random((side, side), np.float32)
        tensors.append(onnx.numpy_helper.from_array(values, f"w{index}"))
        out = "y" if index == count - 1 else f"y{index}"
        nodes.append(onnx.helper.make_node("MatMul", [last, f"w{index}"], [out]))
        last = out
    graph = onnx.helper.make_graph(nodes, "g", inputs[:1], inputs[1:], tensors)
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path,
        save_as_external_data=True, location="model.onnx.data",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CONVERTED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r"\d+", done.stdout)[-1]) < 0.6 * count * 4 * side**2
