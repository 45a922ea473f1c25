"""Traces a torch module to an ONNX model (opset 21) in which quantised layers keep their integers.

    to_ir(Transformer(sd3), example, inputs, outputs) -> onnx_ir.Model

`torch.onnx.export` emits every `edgeprune::packed_linear` as one PackedLinear node, which lowering.py replaces. A
module of fake tensors is traced like one of real tensors; its weights are read later, one at a time, when
external_data.py writes them. Tensors that the checkpoint stores in half precision stay so in the file, followed by a
Cast.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import opset21, values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edgeprune.common.errors import EdgepruneError
from edgeprune.export.lowering import DOMAIN, halve_tables, lower_packed_linear
from edgeprune.export.simplify import simplify
from edgeprune.families import Axes

Read = Callable[[str], torch.Tensor]
"""Reads a tensor by its name."""
OPSET = 21

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT64: torch.int64,
}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_SCHEMA = onnx.defs.OpSchema(
    "PackedLinear",
    DOMAIN,
    1,
    inputs=[
        onnx.defs.OpSchema.FormalParameter("x", "T"),
        onnx.defs.OpSchema.FormalParameter("packed", "tensor(uint8)"),
        onnx.defs.OpSchema.FormalParameter("scale", "S"),
        onnx.defs.OpSchema.FormalParameter("bias", "S", param_option=onnx.defs.OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, "activations"), ("S", _FLOATS, "stored scales and bias")],
    attributes=[onnx.defs.OpSchema.Attribute("bits", onnx.defs.OpSchema.AttrType.INT, "4 or 8", required=True)],
)
_packed_linear_node = values.Op(values.Opset(DOMAIN, 1), "PackedLinear", _SCHEMA)


def _translate(x: Any, packed: Any, scale: Any, bias: Any = None, bits: int = 4) -> Any:
    """Translate `edgeprune::packed_linear` to one ONNX node, which `lower_packed_linear` replaces later."""
    return _packed_linear_node(x, packed, scale, bias, bits=bits)


def _floor_divide(a: Any, b: Any) -> Any:
    """Translate a // b of sizes, rounding down.

    PyTorch's own translation truncates. The exporter writes the crop of the position table as w + 8 + (-w) // 2, which
    would be one column too wide for an odd number of patches.
    """
    return opset21.Div(opset21.Sub(a, opset21.Mod(a, b)), b)


def to_ir(
    module: nn.Module, example: Mapping[str, torch.Tensor], inputs: Axes, outputs: Axes, *, read: Read | None = None
) -> ir.Model:
    """Trace `module(*example.values())` and lower the quantised layers.

    The model computes in the precision of the module and its example: float32 or float16 (modules.half_inputs).

    Args:
        module: one of modules.py, or any module that takes its inputs by position. Its tensors may be fake.
        example: inputs to trace with, by name.
        inputs: dynamic axes of each input.
        outputs: names of the outputs, with the names of their dynamic axes.
        read: reads a weight by its name in the checkpoint; required if the module's tensors are fake.

    Raises:
        EdgepruneError: PyTorch cannot trace or translate the module.
    """
    shapes: tuple[Any, ...] = tuple(dict(inputs[name]) for name in example)
    parameters = inspect.signature(module.forward).parameters.values()
    try:
        with torch.no_grad(), _quiet(), _fake_mode(module) as mode:
            program = torch.onnx.export(
                module,
                args=tuple(mode.from_tensor(tensor) if mode else tensor for tensor in example.values()),
                dynamo=True,
                opset_version=OPSET,
                # *tensors is one argument
                dynamic_shapes=(shapes,) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else shapes,
                input_names=list(example),
                output_names=list(outputs),
                custom_translation_table={
                    torch.ops.edgeprune.packed_linear.default: _translate,
                    operator.floordiv: _floor_divide,
                },
                verbose=False,
                optimize=False,  # it needs real weights
            )
    except torch.onnx.OnnxExporterError as error:
        kind = type(getattr(module, "model", module)).__name__
        raise EdgepruneError(f"{kind}: PyTorch cannot export it: {error}") from error
    assert program is not None
    model = program.model
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix("model.")
        if read is not None and isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            _attach(value, read)
    with _quiet():
        simplify(model)
    lower_packed_linear(model)
    halve_tables(model)
    for value, axes in zip(model.graph.outputs, outputs.values(), strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([axes.get(i, dim) for i, dim in enumerate(value.shape)])
    model.producer_name = "edgeprune"
    # Stack traces: most of a small file, and they reveal paths of this machine.
    ClearMetadataAndDocStringPass()(model)
    return model


@contextmanager
def _fake_mode(module: nn.Module) -> Iterator[FakeTensorMode | None]:
    """Enter the mode that a module's fake tensors belong to; yield None if its tensors are real."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    mode: FakeTensorMode | None = getattr(next(tensors, None), "fake_mode", None)
    with mode or nullcontext():
        yield mode


def _attach(value: ir.Value, read: Read) -> None:
    """Attach lazy data to an initialiser that was traced as a fake tensor: it is read when the file is written."""
    fake, name = value.const_value, value.name
    assert fake is not None and name is not None
    kind, shape = fake.dtype, ir.Shape(fake.shape.numpy())

    def load() -> ir.TensorProtocol:
        return ir.tensor(read(name).to(_TORCH[kind]).numpy(), dtype=kind, name=name)

    value.const_value = ir.LazyTensor(load, kind, shape, name=name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals; a user can do nothing about them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
