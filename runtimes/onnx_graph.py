"""An ONNX model at fixed sizes as a list of operations, from which any run of them becomes a model of its own.

The pieces are small: their weights refer to the data file of the original, which is mapped when a piece is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.pieces import Operation, Sizes, UncountableError
from edgeprune.runtimes import piecewise
from edgeprune.runtimes.onnx_attention import slice_attention
from edgeprune.runtimes.onnx_sizes import sized
from edgeprune.runtimes.onnx_weights import Weights, spans
from edgeprune.runtimes.piecewise import Lookup

with needs("onnx"):
    import onnx
    from google.protobuf.message import DecodeError  # onnx needs it
    from onnx import helper

SMALL = 1 << 16
"""Most bytes of a value that every piece may compute for itself from weights."""
_FUSED_GROUP = 16
"""Fewest INT4 weights that share a scale for which ONNX Runtime has a kernel; their number is a power of two."""
_T = onnx.TensorProto


@dataclass(frozen=True)
class Piece:
    """A part of a model that runs by itself."""

    model: bytes
    """Its ModelProto."""
    reads: tuple[int, ...]
    """The values that its inputs are, in their order."""
    makes: tuple[int, ...]
    """The values that its outputs are, in their order."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spans: list[tuple[int, int]]
    """Begin and end of its weights in the data file."""


class OnnxGraph:
    """The operations of a model whose inputs have fixed shapes.

    A weight's scale, or a small value that depends on weights and sizes alone, belongs to each operation that reads it.
    Larger ones (a table of positions) are values like others, and pass from piece to piece.

    Args:
        path: its file, for messages.
        model: its ModelProto, as `read_model` returns it.
        shapes: of each input.
        data: the file with all of its external data, links resolved.
        sliced: as pieces compute it, with attention in slices; False: as the whole file is computed.
        scales: copies of INT4 weights' scales that stay when they are opened.

    Raises:
        UncountableError: an input is missing, the model does not take one of this shape, or the sizes of its values
            are not known before it runs.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        shapes: Mapping[str, Sequence[int]],
        data: Path,
        *,
        sliced: bool,
        scales: int = 1,
    ) -> None:
        sizing = sized(path, model, shapes)
        self._model, self._sizing, self._scales = model, sizing, scales
        self._weights = Weights(model, sizing, data)
        nodes = [node for node in model.graph.node if not set(node.output) <= sizing.numbers.keys()]
        returned = [one.name for one in model.graph.output]
        if sliced:
            nodes, new = slice_attention(nodes, sizing, set(returned))
            for tensor in new:
                self._weights.add(tensor)
        self._uses: dict[str, int] = {}
        for node in nodes:
            for name in node.input:
                self._uses[name] = self._uses.get(name, 0) + 1
        if not sliced:  # as ONNX Runtime computes a file in which weights are unpacked just before their products
            nodes = self._ordered(nodes)
        self._numbers: dict[str, int] = {}
        self.sizes: list[int] = []
        """Bytes of each value."""
        given = [one.name for one in model.graph.input if one.name not in self._weights]
        self.inputs = {name: self._number(name) for name in given}
        """The values that are the model's inputs, by name."""
        self.nodes: list[Any] = []
        self.operations: list[Operation] = []
        """In execution order, one for each of `nodes`."""
        for node in nodes:
            if self._weights.read_by(node) and self._is_unpacking(node):
                self._weights.make(node)
            else:
                self.nodes.append(node)
                self.operations.append(self._operation(node))
        if constant := [name for name in returned if name in self._weights]:
            raise UncountableError(f"{path}: {constant[0]}: found an output that depends on no input; export again")
        self.outputs = {name: self._number(name) for name in returned}
        """The values that the model returns, by name."""
        self._names = list(self._numbers)

    def measured(self) -> Sizes:
        """Return the operations with the bytes of all values."""
        return Sizes(self.operations, self.sizes, tuple(self.inputs.values()), tuple(set(self.outputs.values())))

    def _number(self, name: str) -> int:
        """Return the number of a value."""
        if name not in self._numbers:
            self._numbers[name] = len(self.sizes)
            self.sizes.append(self._sizing.kinds[name].size)
        return self._numbers[name]

    def _operation(self, node: Any) -> Operation:
        names = list(dict.fromkeys(name for name in node.input if name))
        reads = tuple(self._number(name) for name in names if name not in self._weights)
        opened = [self._opened(name) for name in names if name in self._weights]
        weights, converted = (sum(sizes) for sizes in zip(*opened, strict=True)) if opened else (0, 0)
        makes = tuple(self._number(name) for name in node.output if name)
        return Operation(weights, reads, makes, converted, alone=self._is_lookup(node))

    def _opened(self, name: str) -> tuple[int, int]:
        """Return the bytes of a fixed value as opened, and those of them that are made from others meanwhile."""
        maker, size = self._weights.makers[name], self._sizing.kinds[name].size
        if maker is None:
            return size, 0
        if maker.op_type != "DequantizeLinear":
            return size, size
        # It is fused with its product, and the integers stay.
        integers, scales = (self._sizing.kinds[one].size for one in maker.input[:2])
        return integers + self._scales * scales, scales

    def _is_unpacking(self, node: Any) -> bool:
        """Return whether a node that reads what is fixed becomes part of a weight when it is opened."""
        if node.op_type == "DequantizeLinear":
            integers, scales = (self._sizing.kinds[name] for name in node.input[:2])
            group = integers.shape[0] // max(1, scales.shape[0]) if scales.shape else 0
            fused = integers.element == _T.INT4 and group >= _FUSED_GROUP and group & (group - 1) == 0
            return fused and self._uses.get(node.output[0]) == 1
        kinds = [self._sizing.kinds[name] for name in (*node.input, *node.output) if name]
        return node.op_type == "Cast" or all(kind.size <= SMALL for kind in kinds)

    def _is_lookup(self, node: Any) -> bool:
        """Return whether a node looks up whole rows of a large table."""
        if node.op_type != "Gather" or node.domain or not self._weights.is_stored(node.input[0]):
            return False
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        kind = self._sizing.kinds[node.input[0]]
        known = kind.element in (_T.FLOAT, _T.FLOAT16, _T.INT8)
        return known and axis == 0 and node.input[1] not in self._weights and kind.size >= piecewise.TABLE

    def cut(self, ranges: Sequence[range]) -> list[Piece | Lookup]:
        """Return a model for each range of operations, or a lookup.

        Args:
            ranges: in order, without gaps.
        """
        last = {value: index for index, one in enumerate(self.operations) for value in one.reads}
        last |= dict.fromkeys(self.outputs.values(), len(self.operations))
        return [self._piece(part, last) for part in ranges]

    def _piece(self, part: range, last: Mapping[int, int]) -> Piece | Lookup:
        """Return a range of operations; `last` is the place of the last that reads a value."""
        inside = self.operations[part.start : part.stop]
        made = dict.fromkeys(value for one in inside for value in one.makes)
        reads = tuple(dict.fromkeys(value for one in inside for value in one.reads if value not in made))
        makes = tuple(value for value in made if last.get(value, -1) >= part.stop)
        nodes = self.nodes[part.start : part.stop]
        if inside[0].alone:
            table = self._weights.array(nodes[0].input[0])
            return Lookup(table, table.dtype, reads, makes)
        unpacking, weights = self._weights.behind(name for node in nodes for name in node.input if name)
        inputs, outputs = ([self._names[value] for value in values] for values in (reads, makes))
        graph = helper.make_graph(
            [*unpacking, *self._ordered(nodes)], "piece", self._infos(inputs), self._infos(outputs), weights
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return Piece(model.SerializeToString(), reads, makes, tuple(inputs), tuple(outputs), spans(weights))

    def _infos(self, names: Sequence[str]) -> list[Any]:
        return [helper.make_value_info(name, self._sizing.kinds[name].proto()) for name in names]

    def _ordered(self, nodes: Sequence[Any]) -> list[Any]:
        """Return a piece's nodes with those first that read no input of the network, directly or not.

        ONNX Runtime computes what a node reads in the order of falling places. If a weight is unpacked just before its
        product, all weights are unpacked before anything is computed: 415 instead of 21 MB for 20 layers of INT8.
        """
        free: set[str] = set(self._weights.makers)
        early, late = list[Any](), list[Any]()
        for node in nodes:
            is_free = all(name in free for name in node.input if name)
            (early if is_free else late).append(node)
            free |= set(node.output) if is_free else set()
        return early + late


def read_model(path: Path) -> Any:
    """Return the ModelProto of a file, without its external data.

    Raises:
        InputError: it is none.
        UncountableError: it has functions, which cannot be cut.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not a complete ONNX model: {error}; export again") from None
    if model.functions:
        raise UncountableError(f"{path}: found functions of its own, expected operations of ONNX alone; export again")
    return model


def input_kinds(model: Any) -> dict[str, Any]:
    """Return the type of each input, by name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    given = [one for one in model.graph.input if one.name not in weights]
    return {one.name: helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type) for one in given}
