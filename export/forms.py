"""Quantised layers written in forms that TensorRT takes; the values stay what they are.

INT8, one scale per output: as quantisation per channel rather than in blocks of the whole input. Scales are constants
in the precision of the activations, not casts.
"""

from __future__ import annotations

import onnx_ir as ir


def per_output(model: ir.Model) -> None:
    """Give INT8 weights of one group a scale vector (O) on axis 1 instead of (1, O) with a block, in place."""
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
    """A scale as an initialiser, cast already; in place."""
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
