"""An OpenVINO model of fixed sizes as a list of operations, from which any run of them becomes a model of its own.

The pieces share the constants of the original, which stay in its mapped file: nothing is copied until a piece is
compiled.
"""

from __future__ import annotations

# This file's folder on sys.path would hide OpenVINO's own package; see openvino.py.
if __name__ != "edgeprune.runtimes.openvino_graph":
    raise ImportError(f"import this module as edgeprune.runtimes.openvino_graph, not as {__name__}")

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.common.extras import needs
from edgeprune.common.pieces import Operation, Sizes
from edgeprune.runtimes import piecewise
from edgeprune.runtimes.piecewise import Lookup

with needs("openvino"):
    import openvino
    from openvino import opset13

_WIDENED = {openvino.Type.f16: 2, openvino.Type.bf16: 2}
"""Bytes of an opened weight by those in the file, where it is widened: the CPU computes in float32."""
_WIDEST_HEAD = 256
"""Numbers of a query for which devices have a kernel."""


@dataclass(frozen=True)
class Piece:
    """A part of a model that runs by itself."""

    model: openvino.Model
    reads: tuple[int, ...]
    """The values that its inputs are, in their order."""
    makes: tuple[int, ...]
    """The values that its outputs are, in their order."""


class Graph:
    """The operations of a model whose sizes are fixed.

    What depends on weights and sizes alone (a weight's scale, a table of positions) belongs to the operation that reads
    it. Cutting rewires the model, so it is done once.

    Args:
        model: with fixed sizes; it is changed.
    """

    def __init__(self, model: openvino.Model) -> None:
        self._model = model
        freeze_shapes(model)
        fuse_attention(model)
        nodes = model.get_ordered_ops()
        fixed: set[int] = set()
        self.nodes: list[Any] = []
        for node in nodes:
            kind = node.get_type_name()
            if kind == "Constant" or (kind not in ("Parameter", "Result") and _reads_only(node, fixed)):
                fixed.add(node.get_instance_id())
            elif kind not in ("Parameter", "Result"):
                self.nodes.append(node)
        self._fixed = fixed
        self._numbers: dict[tuple[int, int], int] = {}
        self.sizes: list[int] = []
        """Bytes of each value."""
        self._values: list[Any] = []
        self.inputs = {port.any_name: self._number(port) for port in model.inputs}
        """The values that are the model's inputs, by name."""
        counted: set[int] = set()
        self.operations = [self._operation(node, counted) for node in self.nodes]
        """In execution order, one for each of `nodes`."""
        self.outputs = {
            name: self._number(port.get_node().input_value(0)) for port in model.outputs for name in port.names
        }
        """The values that the model returns, by name."""

    def measured(self) -> Sizes:
        """Return the operations with the bytes of all values."""
        return Sizes(self.operations, self.sizes, tuple(self.inputs.values()), tuple(set(self.outputs.values())))

    def _number(self, port: Any) -> int:
        """Return the number of a value."""
        key = port.get_node().get_instance_id(), port.get_index()
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.sizes.append(int(np.prod(port.get_shape(), dtype=np.int64)) * port.get_element_type().size)
            self._values.append(port)
        return self._numbers[key]

    def _operation(self, node: Any, counted: set[int]) -> Operation:
        ports = [port for port in node.input_values() if port.get_node().get_instance_id() not in self._fixed]
        reads = tuple(dict.fromkeys(self._number(port) for port in ports))
        opened = [
            (opened_bytes(constant), int(constant.get_byte_size())) for constant in self._constants(node, counted)
        ]
        weights, converted = sum(size for size, _ in opened), sum(size for size, stored in opened if size > stored)
        makes = tuple(self._number(port) for port in node.outputs())
        return Operation(weights, reads, makes, converted, alone=_table(node) is not None)

    def _constants(self, node: Any, seen: set[int]) -> Iterator[Any]:
        """Yield the constants that a node reads, through what depends on constants alone, and that were not seen."""
        for port in node.input_values():
            source = port.get_node()
            key = source.get_instance_id()
            if key not in self._fixed or key in seen:
                continue
            seen.add(key)
            if source.get_type_name() == "Constant":
                yield source
            else:
                yield from self._constants(source, seen)

    def cut(self, ranges: Sequence[range]) -> list[Piece | Lookup]:
        """Return a model for each range of operations, or a lookup.

        Args:
            ranges: in order, without gaps.
        """
        place = {
            node.get_instance_id(): index
            for index, part in enumerate(ranges)
            for node in self.nodes[part.start : part.stop]
        }
        reads: list[dict[int, Any]] = [{} for _ in ranges]
        makes: list[dict[int, None]] = [{} for _ in ranges]
        returned = set(self.outputs.values())
        for value, port in enumerate(self._values):
            maker = place.get(port.get_node().get_instance_id())
            if value in returned and maker is not None:
                makes[maker][value] = None
            for target in port.get_target_inputs():
                user = place.get(target.get_node().get_instance_id())
                if user is None or user == maker:
                    continue
                if maker is not None:
                    makes[maker][value] = None
                if value not in reads[user]:
                    reads[user][value] = opset13.parameter(port.get_shape(), port.get_element_type())
                target.replace_source_output(reads[user][value].output(0))
        out: list[Piece | Lookup] = []
        for part, inputs, outputs in zip(ranges, reads, makes, strict=True):
            if self.operations[part.start].alone:
                table = _table(self.nodes[part.start])
                kind = np.int8 if table.get_element_type() == openvino.Type.i8 else np.float32
                out.append(Lookup(table.data, kind, tuple(inputs), tuple(outputs)))
                continue
            results = [opset13.result(self._values[value]) for value in outputs]
            model = openvino.Model(results, list(inputs.values()), self._model.get_friendly_name())
            out.append(Piece(model, tuple(inputs), tuple(outputs)))
        return out


def _table(node: Any) -> Any:
    """Return the large table from which a node looks up whole rows; None if it does not."""
    if node.get_type_name() != "Gather" or node.get_attributes().get("batch_dims", 0):
        return None
    table, axis = node.input_value(0).get_node(), node.input_value(2).get_node()
    if any(one.get_type_name() != "Constant" for one in (table, axis)) or axis.data.any():
        return None
    known = table.get_element_type() in (openvino.Type.f16, openvino.Type.f32, openvino.Type.i8)
    return table if known and table.get_byte_size() >= piecewise.TABLE else None


def freeze_shapes(model: openvino.Model) -> None:
    """Replace what a model of fixed sizes asks of its values' shapes by constants, in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ShapeOf":
            shape = np.array(node.input_value(0).get_shape(), node.get_output_element_type(0).to_dtype())
            node.output(0).replace(opset13.constant(shape).output(0))


def fuse_attention(model: openvino.Model) -> None:
    """Replace softmax(q k) v by one operation, in place: a device then need not hold tokens x tokens numbers.

    The one head of a VAE is too wide for the devices' kernels.
    """
    for softmax in model.get_ordered_ops():
        users = list(softmax.output(0).get_target_inputs())
        if softmax.get_type_name() != "Softmax" or len(users) != 1 or users[0].get_index() != 0:
            continue
        scores, product = softmax.input_value(0).get_node(), users[0].get_node()
        if not _is_plain_matmul(scores) or not _is_plain_matmul(product):
            continue
        query, key, value = scores.input_value(0), scores.input_value(1), product.input_value(1)
        rank = len(query.get_shape())
        last = softmax.get_attributes()["axis"] in (-1, rank - 1)
        if not last or len(key.get_shape()) != rank or query.get_shape()[-1] > _WIDEST_HEAD:
            continue
        order = np.array([*range(rank - 2), rank - 1, rank - 2])
        key = opset13.transpose(key, order).output(0)
        fused = opset13.scaled_dot_product_attention(query, key, value, scale=np.float32(1))
        fused.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(fused.output(0))


def _is_plain_matmul(node: Any) -> bool:
    return node.get_type_name() == "MatMul" and not (
        node.get_attributes()["transpose_a"] or node.get_attributes()["transpose_b"]
    )


def _reads_only(node: Any, fixed: set[int]) -> bool:
    """Return whether a node reads nothing but what is fixed."""
    return all(port.get_node().get_instance_id() in fixed for port in node.input_values())


def opened_bytes(constant: Any) -> int:
    """Return the bytes that a constant takes when it is opened."""
    return int(constant.get_byte_size()) * _WIDENED.get(constant.get_element_type(), 1)
