"""The type and shape of every value of an ONNX graph whose inputs have fixed shapes; weights are not read.

An export computes sizes as it runs (Shape, Mul, Concat, Reshape). With fixed inputs these numbers are known, and so are
the shapes of everything that depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.extras import needs
from edgeprune.common.pieces import UncountableError

with needs("onnx"):
    import onnx
    from onnx import defs, helper, numpy_helper, shape_inference
    from onnx.reference import ReferenceEvaluator

MOST_NUMBERS = 1024
"""Integers with at most so many elements are computed if they depend on sizes and other integers alone."""
_LIKE_INPUT = {"GroupNormalization"}
"""Operations that ONNX defines by others, without a rule for shapes: the output is like the first input."""
_T = onnx.TensorProto
_BITS: dict[int, int] = {
    **dict.fromkeys((_T.DOUBLE, _T.INT64, _T.UINT64), 64),
    **dict.fromkeys((_T.FLOAT, _T.INT32, _T.UINT32), 32),
    **dict.fromkeys((_T.FLOAT16, _T.BFLOAT16, _T.INT16, _T.UINT16), 16),
    **dict.fromkeys((_T.INT8, _T.UINT8, _T.BOOL), 8),
    **dict.fromkeys((_T.INT4, _T.UINT4), 4),
}
"""Of an element, by ONNX's number of the type."""
_WHOLE = (_T.INT64, _T.INT32, _T.BOOL)
"""Types of sizes."""


@dataclass(frozen=True)
class Kind:
    """What a value is."""

    element: int
    """ONNX's number of the type."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, rounded up."""
        return (math.prod(self.shape) * _BITS[self.element] + 7) // 8

    def proto(self) -> Any:
        """Return ONNX's form of it."""
        return helper.make_tensor_type_proto(self.element, self.shape)


@dataclass(frozen=True)
class Sizing:
    """A graph at fixed shapes of its inputs."""

    kinds: dict[str, Kind]
    """Of every value, weights included."""
    numbers: dict[str, NDArray[Any]]
    """The values that depend on sizes alone."""


def sized(path: Path, model: Any, shapes: Mapping[str, Sequence[int]]) -> Sizing:
    """Return the type and shape of every value.

    Args:
        path: the file, for messages.
        model: its ModelProto; external weights are not read.
        shapes: of each input.

    Raises:
        UncountableError: an input is missing, an operation does not take one of this shape, or the shape of a value
            depends on more than the shapes of the inputs.
    """
    versions = {one.domain: one.version for one in model.opset_import}
    types: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for tensor in model.graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if tensor.data_location != _T.EXTERNAL and math.prod(tensor.dims) <= MOST_NUMBERS:
            known[tensor.name] = tensor  # floats too: the rule for Resize reads its scales
    weights = set(types)
    for given in model.graph.input:
        if given.name in weights:
            continue
        if given.name not in shapes:
            raise UncountableError(f"{path}: inputs: the model also needs {given.name}, found {sorted(shapes)}")
        types[given.name] = helper.make_tensor_type_proto(given.type.tensor_type.elem_type, shapes[given.name])
    for node in model.graph.node:
        made = _numbers(node, types, known, versions)
        if made is None:
            types |= _inferred(path, node, types, known, versions, model)
            continue
        for name, value in zip(node.output, made, strict=True):
            known[name] = numpy_helper.from_array(np.asarray(value), name)
            types[name] = helper.make_tensor_type_proto(known[name].data_type, known[name].dims)
    numbers = {name: numpy_helper.to_array(tensor) for name, tensor in known.items() if name not in weights}
    return Sizing({name: _kind(kind) for name, kind in types.items()}, numbers)


def _numbers(
    node: Any, types: Mapping[str, Any], known: Mapping[str, Any], versions: Mapping[str, int]
) -> list[Any] | None:
    """Return the integers that a node makes if they depend on sizes alone and are few, else None."""
    if node.op_type == "Shape" and not node.domain and node.input[0] in types:
        shape = _kind(types[node.input[0]]).shape
        limits = {one.name: one.i for one in node.attribute}
        return [np.array(shape[limits.get("start", 0) : limits.get("end", len(shape))], np.int64)]
    read = [name for name in node.input if name]
    if node.domain or not read or any(name not in known or known[name].data_type not in _WHOLE for name in read):
        return None
    given, made = ([onnx.ValueInfoProto(name=name) for name in names] for names in (read, node.output))
    try:
        one = ReferenceEvaluator(helper.make_graph([node], "one", given, made), opsets=dict(versions))
        values: Any = one.run(None, {name: numpy_helper.to_array(known[name]) for name in read})
    except Exception:  # it raises whatever numpy raises; the rules for shapes have a message
        return None
    few = all(np.size(value) <= MOST_NUMBERS for value in values)
    kinds = {helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype) for value in values}
    return list(values) if few and kinds <= set(_WHOLE) else None


def _inferred(
    path: Path,
    node: Any,
    types: Mapping[str, Any],
    known: Mapping[str, Any],
    versions: Mapping[str, int],
    model: Any,
) -> dict[str, Any]:
    """Return the types of what a node makes, by ONNX's own rules."""
    if node.op_type in _LIKE_INPUT and not node.domain:
        return {node.output[0]: types[node.input[0]]}
    read = [name for name in node.input if name]
    where = f"{path}: {node.name or node.output[0]}: {node.op_type}"
    try:
        found = shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, versions[node.domain], node.domain),
            node,
            {name: types[name] for name in read},
            {name: known[name] for name in read if name in known},
            opset_imports=list(model.opset_import),
            ir_version=model.ir_version,
        )
    except (defs.SchemaError, KeyError):
        found = {}  # another domain's operation, or a value that no node makes
    except shape_inference.InferenceError as error:
        inputs = {name: _kind(types[name]).shape for name in read}
        raise UncountableError(f"{where}: found inputs of shapes {inputs}: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise UncountableError(f"{where}: {' '.join(str(error).split())}; export again") from None
    nested = any(one.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for one in node.attribute)
    if nested or any(not _is_fixed(found.get(name)) for name in node.output if name):
        raise UncountableError(
            f"{where}: found values whose sizes are known only when it runs, expected sizes that follow from those of "
            "the inputs; export again, or omit memory to open the network whole"
        )
    return {name: found[name] for name in node.output if name}


def _is_fixed(kind: Any) -> bool:
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return False
    return kind.tensor_type.elem_type in _BITS and all(one.HasField("dim_value") for one in kind.tensor_type.shape.dim)


def _kind(proto: Any) -> Kind:
    return Kind(proto.tensor_type.elem_type, tuple(one.dim_value for one in proto.tensor_type.shape.dim))
