"""Describes a VAE's decoder of ONNX in layers, cuts it into segments and opens them; see strip_decoder.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.onnx_graph import Piece
from edgeprune.runtimes.onnx_sizes import sized
from edgeprune.runtimes.onnx_weights import Weights, spans
from edgeprune.runtimes.strip_decoder import INPUT
from edgeprune.runtimes.strip_norms import Norm
from edgeprune.runtimes.strips import Described, Layer, Plan, plan

with needs("onnx"):
    import onnx
    from onnx import helper, numpy_helper

_POINTWISE = {"Add", "Cast", "Div", "Mul", "Sigmoid", "Sqrt", "Sub"}
_RESHAPING = {"Reshape", "Squeeze", "Unsqueeze"}
_FLOAT = onnx.TensorProto.FLOAT


class Runs(Protocol):
    """An opened model."""

    def __call__(self, feed: Sequence[Any]) -> Sequence[Any]:
        """Return all outputs, in their order, for all inputs in theirs."""
        ...


class OnnxStrips:
    """A decoder at one size of latents, as layers, and cut into segments.

    Args:
        path: its file, for messages.
        model: its ModelProto; external weights are not read.
        shape: of the latents, (1, C, h, w).
        data: the file with all of its external data, links resolved.
        opening: opens a model.

    Raises:
        InputError: strips cannot compute it.
    """

    def __init__(
        self, path: Path, model: Any, shape: Sequence[int], data: Path, opening: Callable[[Piece], Runs]
    ) -> None:
        sizing = sized(path, model, {INPUT: shape})
        self._path, self._model, self._kinds, self._opening = path, model, sizing.kinds, opening
        self._weights = Weights(model, sizing, data)
        self._numbers: dict[str, int] = {}
        source, result = self._number(INPUT), model.graph.output[0].name
        self._nodes: list[Any] = []
        layers = []
        for node in model.graph.node:
            if set(node.output) <= sizing.numbers.keys():
                continue
            if self._weights.read_by(node):
                self._weights.make(node)
                continue
            self._nodes.append(node)
            layers.append(self._layer(node))
        shapes = {value: sizing.kinds[name].shape for name, value in self._numbers.items()}
        described = Described(tuple(layers), shapes, source, self._number(result))
        try:
            self.plan: Plan = plan(described)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self._names = list(self._numbers)

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def _layer(self, node: Any) -> Layer:
        """Describe an operation.

        Raises:
            InputError: strips cannot compute it.
        """
        kind, inputs = node.op_type, [name for name in node.input if name]
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        reads = tuple(None if name in self._weights else self._number(name) for name in inputs)
        weights = sum(self._kinds[name].size for name in inputs if name in self._weights)
        made = self._number(node.output[0])
        shape, before = (self._kinds[name].shape for name in (node.output[0], inputs[0]))
        if any(self._kinds[name].element != _FLOAT for name in (node.output[0], inputs[0])):
            pass
        elif kind in _POINTWISE:
            return Layer("pointwise", reads, made, weights)
        elif kind == "ReduceSum" and attributes.get("keepdims", 1):
            return Layer("reduce", reads[:1], made)
        elif kind == "Conv":
            rows = self._kinds[inputs[1]].shape[2]
            pads = attributes.get("pads", [0, 0, 0, 0])
            plain = {*attributes.get("strides", [1]), *attributes.get("dilations", [1])} == {1}
            fixed = attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
            if plain and fixed and rows % 2 and pads[0] == pads[2] == rows // 2 and reads[1] is None:
                return Layer("conv", reads[:1], made, weights, halo=rows // 2)
        elif kind == "Resize":
            upright = len(shape) == 4 and shape[2] % before[2] == 0 and shape[:2] == before[:2]
            by_scale = len(node.input) == 3 and attributes.get("mode", b"nearest") == b"nearest"
            if upright and by_scale and attributes.get("coordinate_transformation_mode") == b"asymmetric":
                return Layer("upsample", reads[:1], made)
        elif kind == "GroupNormalization" and all(self._weights.is_stored(name) for name in inputs[1:]):
            gamma, beta = (np.asarray(self._weights.array(name), np.float32) for name in inputs[1:])
            norm = Norm(int(attributes["num_groups"]), float(attributes.get("epsilon", 1e-5)), gamma, beta)
            return Layer("norm", reads[:1], made, norm=norm)
        elif kind in _RESHAPING:
            return Layer("reshape", reads[:1], made)
        elif kind == "Transpose" and "perm" in attributes:
            return Layer("transpose", reads[:1], made, order=tuple(attributes["perm"]))
        elif kind == "Softmax":
            return Layer("softmax", reads, made, axis=int(attributes.get("axis", -1)))
        elif kind == "MatMul":
            return Layer("matmul", reads, made, weights)
        where = f"{self._path}: {node.name or node.output[0]}"
        raise InputError(f"{where}: found {kind} {attributes}, which strips of rows cannot compute")

    def opened(self, index: int, rows: int) -> OpenedSegment:
        """Open the segment of this place for strips of so many rows."""
        segment, layers = self.plan.segments[index], self.plan.network.layers
        nodes, new = list[Any](), list[Any]()
        factors: list[tuple[str, tuple[int, ...]]] = []
        for i in segment.layers:
            node, layer = self._nodes[i], layers[i]
            shape = self.plan.network.shapes[layer.makes]
            if layer.kind == "norm":
                names = [f"edgeprune/norm/{i}/{what}" for what in ("scale", "scaled", "shift")]
                factors += [(names[place], (1, shape[1], *(1 for _ in shape[2:]))) for place in (0, 2)]
                nodes.append(helper.make_node("Mul", [node.input[0], names[0]], [names[1]]))
                nodes.append(helper.make_node("Add", [names[1], names[2]], [node.output[0]]))
            elif layer.kind == "reshape":
                pattern = [-1 if axis == self.plan.rows[layer.makes].axis else size for axis, size in enumerate(shape)]
                new.append(numpy_helper.from_array(np.array(pattern, np.int64), f"edgeprune/shape/{i}"))
                nodes.append(helper.make_node("Reshape", [node.input[0], new[-1].name], [node.output[0]]))
            else:
                nodes.append(node)
        reads = (*segment.strips, *segment.whole)
        given = [(self._names[value], self.plan.strip_shape(value, segment, rows)) for value in reads] + factors
        makes = [self._names[value] for value in segment.makes]
        unpacking, weights = self._weights.behind(name for node in nodes for name in node.input if name)
        graph = helper.make_graph(
            [*unpacking, *nodes],
            "segment",
            [helper.make_tensor_value_info(name, _FLOAT, shape) for name, shape in given],
            [helper.make_tensor_value_info(name, _FLOAT, None) for name in makes],
            [*weights, *new],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        inputs = tuple(name for name, _ in given)
        piece = Piece(model.SerializeToString(), reads, segment.makes, inputs, tuple(makes), spans(weights))
        return OpenedSegment(self._opening(piece), piece, segment.norms, [shape for _, shape in factors])


class OpenedSegment:
    """An opened segment, as strip_runner.Opened."""

    def __init__(self, runs: Runs, piece: Piece, norms: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> None:
        self._runs: Runs | None = runs
        self._piece, self._norms, self._shapes = piece, norms, shapes

    def __call__(self, values: Mapping[int, Array], affine: Mapping[int, tuple[Array, Array]]) -> dict[int, Array]:
        """Return what the segment makes of a strip."""
        assert self._runs is not None  # it is not closed
        numbers: Sequence[Array] = [one for norm in self._norms for one in affine[norm]]
        feed = [values[value] for value in self._piece.reads]
        feed += [one.reshape(shape) for one, shape in zip(numbers, self._shapes, strict=True)]
        return dict(zip(self._piece.makes, self._runs(feed), strict=True))

    def close(self) -> None:
        """Free the opened model."""
        self._runs = None
