"""Quantised layers written in forms that TensorRT takes; the values stay what they are.

**INT8, one scale per output**: as quantisation per channel rather than in blocks of the whole input.

**INT4 with scales above zero only** (`make_positive`). NNCF gives about half of the groups a negative scale, so that -8
can stand for the largest weight of either sign; the ONNX parsers of TensorRT 10 refuse those. A group of negative
scale s and integers q keeps its values by

    q * s  =  ~q * |s| + |s|        (~q = -q - 1, which is in -8..7 again)

so the integers of such groups are inverted bit by bit, and |s| is added to all of the group's weights: on the
activations' side that is the sum of x over each group times |s|, a product 1 / group_size as large as the layer's.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def per_output(model: ir.Model) -> None:
    """Give INT8 weights of one group a scale vector (O) on axis 1 instead of (1, O) with a block, in place."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale = node.inputs[:2]
        assert weight is not None and scale is not None and scale.const_value is not None
        values = scale.const_value.numpy()
        if weight.dtype == ir.DataType.INT8 and values.ndim == 2 and values.shape[0] == 1:
            scale.const_value = ir.tensor(values[0], name=scale.name)
            scale.shape = scale.const_value.shape
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
            del node.attributes["block_size"]


def make_positive(model: ir.Model) -> int:
    """Rewrite every INT4 layer that has a scale of zero or below, in place; returns how many there were."""
    layers = [node for node in model.graph if node.op_type == "DequantizeLinear" and _has_others(node)]
    for node in layers:
        _rewrite(model.graph, node)
    return len(layers)


def _has_others(node: ir.Node) -> bool:
    weight, scale = node.inputs[:2]
    assert weight is not None and scale is not None and scale.const_value is not None
    return weight.dtype == ir.DataType.INT4 and bool((scale.const_value.numpy() <= 0).any())


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    weight, scale = node.inputs[:2]
    assert weight is not None and scale is not None
    assert weight.const_value is not None and scale.const_value is not None
    ((product, _),) = node.outputs[0].uses()
    scales = scale.const_value.numpy()  # (G, O)
    groups, size = scales.shape[0], node.attributes["block_size"].as_int()
    flip, nothing = scales < 0, scales == 0
    invert = functools.partial(_inverted, weight.const_value, flip, nothing, size)
    weight.const_value = ir.LazyTensor(invert, ir.DataType.INT4, weight.const_value.shape, name=weight.name)
    # A group of zeros has scale 0 and any integers: make the integers 0 and the scale 1.
    scale.const_value = ir.tensor(np.where(nothing, scales.dtype.type(1), np.abs(scales)), name=scale.name)

    def constant(suffix: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=f"{node.name}.{suffix}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    x, sum_name = product.inputs[0], f"{node.name}.groups"
    assert x is not None and x.shape is not None
    offset = constant("offset", np.where(flip, -scales, scales.dtype.type(0)))
    split = constant("split", np.array([0] * (len(x.shape) - 1) + [groups, size], np.int64))  # 0 keeps a size
    reshaped = ir.node("Reshape", [x, split], name=f"{sum_name}.reshape")
    summed = ir.node(
        "ReduceSum", [reshaped.outputs[0], constant("axis", np.array([-1], np.int64))], {"keepdims": 0}, name=sum_name
    )
    correction = ir.node("MatMul", [summed.outputs[0], offset], name=f"{sum_name}.matmul")
    plain = ir.node("MatMul", [x, node.outputs[0]], name=product.name)
    total = ir.node("Add", [plain.outputs[0], correction.outputs[0]], name=f"{sum_name}.add")
    new = [reshaped, summed, correction, plain, total]
    for made in new:
        made.outputs[0].dtype = x.dtype
    ir.convenience.replace_nodes_and_values(graph, product, [product], new, product.outputs, total.outputs)


def _inverted(weight: ir.TensorProtocol, flip: NDArray[Any], nothing: NDArray[Any], size: int) -> ir.TensorProtocol:
    """The integers (I, O) with the groups of `flip` (G, O) inverted and those of `nothing` zero."""
    integers = weight.numpy().astype(np.int8)
    integers = np.where(np.repeat(flip, size, axis=0), ~integers, integers)
    integers = np.where(np.repeat(nothing, size, axis=0), 0, integers)
    flat = integers.reshape(-1).view(np.uint8) & 0xF
    return ir.PackedTensor(flat[0::2] | flat[1::2] << 4, ir.DataType.INT4, shape=integers.shape, name=weight.name)
