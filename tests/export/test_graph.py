"""Tracing to ONNX, the lowering of quantised layers, simplification, and the comparison with torch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import tiny
import torch
from quantised import packed, quantised
from torch import nn

from edgeprune.common.errors import EdgepruneError, ParityError
from edgeprune.export import external_data, graph, modules, parity
from edgeprune.export.simplify import simplify

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer(bits: int, bias: bool, tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            # An odd number of outputs: rows of the transposed matrix do not end at a byte.
            self.model = packed(nn.Linear(48, 7, bias=bias), bits, 16, torch.Generator().manual_seed(1))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x),)

    module, x = Wrapper(), {"x": torch.randn(3, 5, 48)}
    built = graph.to_ir(module, x, {"x": {0: "b", 1: "m"}}, {"y": {0: "b", 1: "m"}})
    # Tensors that the checkpoint stores in half precision stay so.
    assert [n.op_type for n in built.graph] == [
        "Cast",
        "DequantizeLinear",
        "MatMul",
        *(["Cast", "Add"] if bias else []),
    ]
    kinds = {str(value.dtype) for value in built.graph.initializers.values()}
    assert kinds == {f"INT{bits}", "FLOAT16"}
    external_data.save(built, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    runner = parity.session(tmp_path / "model.onnx")
    found = parity.check("layer", runner, module, [{"x": torch.randn(1, 9, 48)}], ["y"])
    assert found["max_relative"] < 1e-6


def test_what_is_known_is_not_computed_again() -> None:
    class Once(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            raise AssertionError

    class Doubles:
        steps = 1

        def run(self, names: Any, feeds: Any, *, step: Callable[[], None]) -> list[Any]:
            step()
            return [feeds["x"] * 2]

    x = torch.ones(2, 3)
    told: list[tuple[int, int]] = []
    found = parity.check(
        "double",
        Doubles(),
        Once(),
        [{"x": x}],
        ["y"],
        references=[[2 * x]],
        progress=lambda _, *at: told.append(at[:2]),
    )
    assert found["max_relative"] == 0 and told == [(1, 1)]
    with pytest.raises(ParityError, match=r"relative error of 5\.00e-01"):
        parity.check("double", Doubles(), Once(), [{"x": x}], ["y"], references=[[4 * x]])


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: modules.Transformer(quantised(tiny.tiny_transformer(num_layers=1))),
    "flux": lambda: modules.Transformer(tiny.tiny_flux(num_layers=1, num_single_layers=1)),
    "flux2": lambda: modules.Transformer(tiny.tiny_flux2(num_layers=1, num_single_layers=1)),
    "clip": lambda: modules.TextEncoder(tiny.tiny_text_encoder(400, 399)),
    "t5": lambda: modules.T5Encoder(tiny.tiny_t5(200)),
    "vae": lambda: modules.VaeDecoder(tiny.tiny_vae()),
}


@pytest.mark.parametrize(
    ("name", "half"),
    [
        pytest.param(name, half, marks=() if half and name == "clip" else pytest.mark.slow)
        for name in NETWORKS
        for half in (False, True)
    ],
)
def test_simplified_as_by_onnxscripts_optimizer(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer itself is not used, because it takes minutes for a large transformer."""
    seen: list[int] = []

    def nodes(model: ir.Model) -> list[Any]:
        """Describe the nodes with numbers instead of names, because the passes invent names."""
        numbers: dict[str | None, int] = {}
        tensors = [value.const_value for value in model.graph.initializers.values()]
        return [
            sorted(tensor.tobytes() for tensor in tensors if tensor is not None),
            *(
                (
                    node.op_type,
                    {name: attribute.value for name, attribute in node.attributes.items()},
                    [value and numbers.setdefault(value.name, len(numbers)) for value in (*node.inputs, *node.outputs)],
                )
                for node in model.graph
            ),
        ]

    def both(model: ir.Model) -> None:
        theirs = ir.from_proto(ir.to_proto(model))
        before = len(list(model.graph))
        onnxscript.optimizer.optimize_ir(theirs, input_size_limit=4096, output_size_limit=65536)
        simplify(model)
        assert nodes(ir.from_proto(ir.to_proto(model))) == nodes(theirs)
        seen.append(before - len(list(model.graph)))

    monkeypatch.setattr(graph, "simplify", both)
    wrapper = NETWORKS[name]().eval()
    sizes: dict[str, int] = {"tokens": 7} if name in ("clip", "t5") else {"height": 4, "width": 6}
    if isinstance(wrapper, modules.Transformer):
        sizes["tokens"] = 5
    example = wrapper.example(batch=2, **sizes)
    if half:
        wrapper, example = wrapper.half(), modules.half_inputs(example)
    graph.to_ir(wrapper, example, wrapper.inputs, wrapper.outputs)
    assert seen[0] > 20


def test_patches_of_two_by_two(tmp_path: Path) -> None:
    wrapper = modules.Transformer(tiny.tiny_transformer(patch_size=2, num_layers=1)).eval()
    traced = wrapper.example(batch=2, height=4, width=6, tokens=5)
    external_data.save(graph.to_ir(wrapper, traced, wrapper.inputs, wrapper.outputs), tmp_path / "model.onnx")
    runner = parity.session(tmp_path / "model.onnx")
    examples = [wrapper.example(batch=1, height=h, width=w, tokens=16) for h, w in ((5, 3), (16, 9))]
    assert parity.check("p2", runner, wrapper, examples, list(wrapper.outputs))["max_relative"] < 1e-5


def test_weights_above_a_megabyte_lie_beside(tmp_path: Path) -> None:
    for count, names in ((200_000, ["model.onnx"]), (300_000, ["model.onnx", "model.onnx.data"])):
        folder = tmp_path / str(count)
        folder.mkdir()
        tensor = ir.tensor(np.arange(count, dtype=np.float32), name="w")
        weight = ir.Value(name="w", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        node = ir.node("Identity", [weight])
        built = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
        node.outputs[0].name = "y"
        node.outputs[0].type, node.outputs[0].shape = weight.type, weight.shape
        external_data.save(ir.Model(built, ir_version=10), folder / "model.onnx")
        assert sorted(p.name for p in folder.iterdir()) == names
        (found,) = parity.session(folder / "model.onnx").run(None, {})
        np.testing.assert_array_equal(found, np.arange(count, dtype=np.float32))


def test_relative_error() -> None:
    b = np.array([1.0, -4.0, 0.0])
    assert parity.relative_error(b + np.array([0.0, 0.0, 0.4]), b) == pytest.approx((0.1, 0.4 / 17**0.5))
    assert parity.relative_error(b * 0, b * 0) == (0.0, 0.0)
    infinite = (float("inf"), float("inf"))
    assert parity.relative_error(b, b * 0) == infinite
    assert parity.relative_error(np.array([1.0, np.nan, 0.0]), b) == infinite
    assert parity.relative_error(b, np.array([1.0, np.inf, 0.0])) == infinite
    assert parity.relative_error(b[:2], b) == infinite


def test_an_unknown_module_is_one_error() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                raise RuntimeError("nobody may trace this")
            return (x + 1,)

    with pytest.raises(EdgepruneError, match="Odd: PyTorch cannot export it"):
        graph.to_ir(Odd(), {"x": torch.ones(2, 2)}, {"x": {0: "b"}}, {"y": {0: "b"}})


def test_a_traced_model_can_be_freed() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x.float().unsqueeze(0).unsqueeze(0).squeeze(0).squeeze(0) * 1.0),)

    built = graph.to_ir(Once(), {"x": torch.randn(3, 64)}, {"x": {0: "b"}}, {"y": {0: "b"}})
    weights = [weakref.ref(value.const_value) for value in built.graph.initializers.values()]
    del built
    gc.collect()
    assert len(weights) > 1 and not [weight for weight in weights if weight() is not None]
