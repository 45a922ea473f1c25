"""Rewrites a traced ONNX graph so that quantised layers keep their integers and embedding tables stay small.

    lay_out_weights(model)
    lower_packed_linear(model)
    halve_tables(model)

A traced graph has one `edgeprune::PackedLinear` node per quantised layer. It becomes DequantizeLinear(INT4 or INT8,
axis=0, block_size) -> MatMul -> Add. Weights are stored as (I, O), so no Transpose is left for a runtime to trip over.
They are lazy: each is read, transposed and packed when the file is written, so only one is in memory at a time.

Notation: I and O a layer's inputs and outputs, G groups along I.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import torch

from edgeprune.quantization.int4 import pack, unpack

DOMAIN = "edgeprune"
"""ONNX domain of the PackedLinear node, which exists only until `lower_packed_linear` replaces it."""
_LEAST_TABLE_BYTES = 1024  # a smaller table is not worth a Cast


def lay_out_weights(model: ir.Model) -> None:
    """Store weights (O, I) that are transposed before they multiply as (I, O), in place.

    Each is read and transposed when the file is written. The constant folder would do so at once, with all of them.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or weight.shape is None or len(weight.shape) != 2:
            continue
        out, order = node.outputs[0], node.attributes.get("perm")
        if not out.is_graph_output() and (order is None or list(order.as_ints()) == [1, 0]):
            ir.convenience.replace_all_uses_with(out, _turned(graph, weight))
            graph.remove(node, safe=True)


def lower_packed_linear(model: ir.Model) -> None:
    """Replace each PackedLinear node by DequantizeLinear, MatMul and, if it has a bias, Add; in place."""
    graph = model.graph
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, "PackedLinear"):
            continue
        x, packed, scale = node.inputs[:3]
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        assert packed is not None and scale is not None and packed.name is not None
        bits = node.attributes["bits"].as_int()
        kind = x.dtype or ir.DataType.FLOAT  # type: ignore[union-attr]
        weight_value = _weight(graph, packed, bits)
        nodes: list[ir.Node] = []
        groups = _cast(_turned(graph, scale), kind, nodes)
        features = weight_value.shape[0]  # type: ignore[index]
        assert isinstance(features, int)
        name = packed.name.removesuffix(".weight_packed")
        dequantised = ir.node(
            "DequantizeLinear", [weight_value, groups],
            {"axis": 0, "block_size": features // _shape(scale)[1]}, name=f"{name}.dequantize",
        )  # fmt: skip
        last = ir.node("MatMul", [x, dequantised.outputs[0]], name=f"{name}.matmul")
        nodes += [dequantised, last]
        if bias is not None:
            last = ir.node("Add", [last.outputs[0], _cast(bias, kind, nodes)], name=f"{name}.add")
            nodes.append(last)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, last.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports.pop(DOMAIN, None)


def halve_tables(model: ir.Model) -> None:
    """Store embedding tables (float32 inputs of Gather) in half precision if no value changes; in place."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.uses()) > 1 or node.outputs[0].is_graph_output():
            continue
        values = table.const_value.numpy()
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.nbytes < _LEAST_TABLE_BYTES or not np.array_equal(half, values):
            continue
        table.const_value, table.dtype = ir.tensor(half, name=table.name), ir.DataType.FLOAT16
        rows = node.outputs[0]
        cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}.float")
        wide = cast.outputs[0]
        wide.shape, wide.dtype, rows.dtype = rows.shape, ir.DataType.FLOAT, ir.DataType.FLOAT16
        rows.replace_all_uses_with(wide)
        cast.replace_input_with(0, rows)
        model.graph.insert_after(node, cast)


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initialiser, or return the existing one of this name: layers may share a weight."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        graph.register_initializer(
            ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
        )
    return graph.initializers[tensor.name]


def _weight(graph: ir.Graph, packed: ir.Value, bits: int) -> ir.Value:
    """Turn packed bytes (O, I * bits / 8) into an INT4 or INT8 initialiser (I, O), computed when it is written."""
    outs, row = _shape(packed)
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    shape = ir.Shape([row * 8 // bits, outs])
    name = f"{packed.name}.T"
    assert packed.const_value is not None  # _shape checked it
    make = functools.partial(_transposed, packed.const_value, bits, name)
    return _register(graph, ir.LazyTensor(make, kind, shape, name=name))


def _shape(value: ir.Value) -> tuple[int, int]:
    """Return the rows and columns of an initialiser."""
    assert value.const_value is not None, f"{value.name} is not an initialiser"
    rows, columns = value.const_value.shape.numpy()
    return rows, columns


def _transposed(packed: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    """Unpack (O, I * bits / 8), transpose and pack again in ONNX's order."""
    integers = unpack(torch.from_numpy(packed.numpy().copy()), bits).T.contiguous()
    if bits == 8:
        return ir.tensor(integers.numpy(), name=name)
    # ONNX packs the flattened tensor, lower nibble first. I is even, so the number of values is even too.
    flat = pack(integers.view(1, -1), bits).flatten().numpy()
    return ir.PackedTensor(flat, ir.DataType.INT4, shape=integers.shape, name=name)


def _cast(value: ir.Value, kind: ir.DataType, nodes: list[ir.Node]) -> ir.Value:
    """Return an initialiser in the activations' precision; appends a Cast to `nodes` if it is stored in another one."""
    if value.dtype == kind:
        return value
    nodes.append(ir.node("Cast", [value], {"to": kind}, name=f"{value.name}.cast"))
    return nodes[-1].outputs[0]


def _turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the transpose of an initialiser of two dimensions, computed when the file is written."""
    rows, columns = _shape(value)
    stored = value.const_value
    assert stored is not None
    name = f"{value.name}.T"

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(stored.numpy().T), name=name)

    return _register(graph, ir.LazyTensor(make, stored.dtype, ir.Shape([columns, rows]), name=name))
