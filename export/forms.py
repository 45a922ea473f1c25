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
        if (cast := scale.producer()) is not None:
            stored = cast.inputs[0]
            assert stored is not None and stored.const_value is not None and scale.dtype is not None
            stored.const_value = ir.tensor(stored.const_value.numpy().astype(scale.dtype.numpy()), name=stored.name)
            stored.dtype = scale.dtype
            ir.convenience.replace_all_uses_with(scale, stored)
            model.graph.remove(cast)
            scale = stored
        assert scale.const_value is not None
        values = scale.const_value.numpy()
        if weight.dtype == ir.DataType.INT8 and values.ndim == 2 and values.shape[0] == 1:
            scale.const_value = ir.tensor(values[0], name=scale.name)
            scale.shape = ir.Shape(values[0].shape)
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
            del node.attributes["block_size"]
