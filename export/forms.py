"""Rewrites quantised layers to forms that TensorRT accepts, without changing an integer or a scale.

TensorRT wants INT8 with one scale per output as per-channel quantisation, not as blocks that span the whole input. It
wants scales as constants in the precision of the activations, not behind a Cast, and INT8 constants just before a
DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def per_output(model: ir.Model) -> None:
    """Give INT8 weights with one group a scale vector (O) on axis 1 instead of blocks (1, O); in place."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale = node.inputs[:2]
        assert weight is not None and scale is not None
        scale = _constant(model, scale)
        assert scale.const_value is not None
        shape = scale.const_value.shape.numpy()
        if weight.dtype == ir.DataType.INT8 and len(shape) == 2 and shape[0] == 1:
            scale.const_value = ir.tensor(scale.const_value.numpy()[0], name=scale.name)
            scale.shape = ir.Shape(shape[1:])
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
            del node.attributes["block_size"]


def whole_tables(model: ir.Model) -> None:
    """Dequantise INT8 tables before their rows are looked up, to half precision, in place.

    Elsewhere rows and their scales are looked up, converted and multiplied.
    """
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != ir.DataType.INT8:
            continue
        product = _only_user(_only_user(node))
        cast = next(value.producer() for value in product.inputs if value.producer() is not _only_user(node))
        scale = cast.inputs[0].producer().inputs[0]
        scale.const_value = ir.tensor(scale.const_value.numpy()[:, 0], name=scale.name)
        scale.shape = ir.Shape(scale.shape[:1])
        whole = ir.node("DequantizeLinear", [table, scale], {"axis": 0}, name=f"{table.name}.dequantize")
        rows = ir.node("Gather", [whole.outputs[0], node.inputs[1]], {"axis": 0}, name=node.name)
        wide = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}.float")
        olds = [product, cast, _only_user(node), cast.inputs[0].producer(), node]
        ir.convenience.replace_nodes_and_values(
            model.graph, product, olds, [whole, rows, wide], product.outputs, wide.outputs
        )


def _only_user(node: Any) -> Any:
    """Return the node that reads the only output of another."""
    (use,) = node.outputs[0].uses()
    return use.node


def _constant(model: ir.Model, scale: ir.Value) -> ir.Value:
    """Fold the Cast of a scale into its initialiser, in place, and return that."""
    cast = scale.producer()
    if cast is None:
        return scale
    (stored,) = cast.inputs
    assert stored is not None and stored.const_value is not None
    kind = ir.DataType(cast.attributes["to"].as_int())
    stored.const_value = ir.tensor(stored.const_value.numpy().astype(kind.numpy()), name=stored.name)
    stored.dtype = kind
    ir.convenience.replace_all_uses_with(scale, stored)
    model.graph.remove(cast)
    return stored
