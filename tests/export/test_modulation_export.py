"""Projected modulation in every format: the same velocity as torch, from the same integers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from quantised import thin

from edgeprune.export import coreml_chunks, coreml_packages, forms, graph, modules, parity, to_onnx, to_openvino, to_trt

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


@pytest.fixture(
    scope="module", params=[16, pytest.param(4, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def wrapper(request: pytest.FixtureRequest) -> modules.Transformer:
    return modules.Transformer(thin(request.param))


@pytest.fixture
def traced(wrapper: modules.Transformer) -> dict[str, torch.Tensor]:
    return wrapper.example(batch=2, height=4, width=6, tokens=5)


def examples(wrapper: modules.Transformer) -> list[dict[str, torch.Tensor]]:
    return [wrapper.example(batch=b, height=h, width=w, tokens=16) for b, h, w in ((1, 8, 8), (3, 5, 7))]


def test_onnx_and_openvino(wrapper: modules.Transformer, traced: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "transformer" / "model.onnx"
    path.parent.mkdir()
    model = graph.to_ir(wrapper, traced, wrapper.inputs, wrapper.outputs)
    assert [i.name for i in model.graph.inputs] == list(wrapper.inputs)  # runtimes pass all inputs, used or not
    to_onnx.save("transformer", model, path)
    for runner in (parity.session(path), to_openvino.converted(path)):
        found = parity.check("transformer", runner, wrapper, examples(wrapper), list(wrapper.outputs))
        assert found["max_relative"] < 1e-4


@pytest.mark.slow  # test_trt.py builds engines, and the graph is that of ONNX above
def test_tensorrt(wrapper: modules.Transformer, traced: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    written = copy.deepcopy(wrapper).half()
    model = graph.to_ir(written, modules.half_inputs(traced), wrapper.inputs, wrapper.outputs)
    forms.per_output(model)
    to_onnx.save("transformer", model, tmp_path / "model.onnx")
    runner = parity.session(tmp_path / "model.onnx")
    parity.check("transformer", runner, wrapper, examples(wrapper), list(wrapper.outputs), half=True)
    sizes = {"batch_size": (1, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8), "sequence_length": (16, 16, 16)}
    profile = to_trt.profile_of(wrapper.inputs, traced, sizes)
    builder = to_trt.Builder(trt, b"", lambda *_: None)
    said = builder.build("transformer", tmp_path / "model.onnx", profile, tmp_path / "engine")
    bits = [layer.bits for layer in wrapper.modules() if hasattr(layer, "weight_packed")]
    assert (said["int4_layers"], said["int8_layers"]) == (bits.count(4), bits.count(8))


def test_coreml_in_chunks(wrapper: modules.Transformer, tmp_path: Path) -> None:
    sizes = [wrapper.example(batch=b, height=8, width=8, tokens=16) for b in (1, 2)]
    parts = coreml_chunks.split(wrapper, 2, sizes[0])
    found = coreml_packages.convert_network("transformer", parts, wrapper, sizes, tmp_path, chunks=2)
    assert found["max_relative"] < 1e-3 and found["half_relative"] < 2e-2
    assert len(list(tmp_path.iterdir())) == 2
