"""Rewrites quantised layers to forms that TensorRT accepts, without changing a value.

TensorRT wants INT8 with one scale per output as per-channel quantisation, not as blocks that span the whole input. It
wants scales as constants in the precision of the activations, not behind a Cast.
"""

from __future__ import annotations

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
