"""Describes a VAE's decoder of OpenVINO in layers, cuts it into segments and opens them; see strip_decoder.py."""

from __future__ import annotations

# This file's folder on sys.path would hide OpenVINO's own package; see openvino.py.
if __name__ != "edgeprune.runtimes.openvino_vae":
    raise ImportError(f"import this module as edgeprune.runtimes.openvino_vae, not as {__name__}")

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.openvino_graph import freeze_shapes, opened_bytes
from edgeprune.runtimes.strip_decoder import INPUT
from edgeprune.runtimes.strip_norms import Norm
from edgeprune.runtimes.strips import Described, Layer, Plan, plan

with needs("openvino"):
    import openvino
    from openvino import opset13

if TYPE_CHECKING:
    from edgeprune.runtimes.openvino import OpenVinoFile

_POINTWISE = {"Add", "Convert", "Divide", "Multiply", "Sigmoid", "Sqrt", "Subtract", "Swish"}
_RESHAPING = {"Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class _Piece:
    """The model of a segment."""

    model: openvino.Model
    values: tuple[int, ...]
    """What its first inputs are."""
    norms: tuple[int, ...]
    """The norms whose a and b its further inputs are."""
    makes: tuple[int, ...]


class OpenVinoStrips:
    """A decoder's model at one size of latents, as layers, and cut into segments.

    Raises:
        InputError: strips cannot compute it.
    """

    def __init__(self, file: OpenVinoFile, shape: Sequence[int]) -> None:
        self.file = file
        path, model = file.path, file.read({INPUT: shape})
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise InputError(f"{path}: inputs: found {sorted(file.kinds)}, expected {INPUT}; export again")
        freeze_shapes(model)
        self._model = model  # nodes do not keep it alive
        self._fixed: dict[int, bool] = {}
        self._numbers: dict[int, int] = {}
        self._ports: list[Any] = []
        self._nodes = []
        source = self._number(model.inputs[0])
        layers = []
        for node in model.get_ordered_ops():
            if not self._is_fixed(node) and node.get_type_name() not in ("Parameter", "Result"):
                self._nodes.append(node)
                layers.append(self._layer(node))
        shapes = {value: tuple(port.get_shape()) for value, port in enumerate(self._ports)}
        result = self._number(model.outputs[0].get_node().input_value(0))
        try:
            self.plan: Plan = plan(Described(tuple(layers), shapes, source, result))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self._pieces: list[_Piece] = []

    def opened(self, index: int, rows: int) -> OpenedSegment:
        """Open the segment of this place for strips of so many rows."""
        if not self._pieces:
            self._cut()
        return OpenedSegment(self, index, rows)

    def _is_fixed(self, node: Any) -> bool:
        """Return whether a node depends on weights alone."""
        key = node.get_instance_id()
        if key not in self._fixed:
            inputs = node.input_values()
            constant = node.get_type_name() == "Constant"
            self._fixed[key] = constant or (bool(inputs) and all(self._is_fixed(port.get_node()) for port in inputs))
        return self._fixed[key]

    def _number(self, port: Any) -> int:
        key = port.get_node().get_instance_id()
        if key not in self._numbers:
            self._numbers[key] = len(self._ports)
            self._ports.append(port)
        return self._numbers[key]

    def _layer(self, node: Any) -> Layer:
        """Describe an operation.

        Raises:
            InputError: strips cannot compute it.
        """
        kind, inputs, attributes = node.get_type_name(), node.input_values(), node.get_attributes()
        fixed = [self._is_fixed(port.get_node()) for port in inputs]
        reads = tuple(None if known else self._number(port) for known, port in zip(fixed, inputs, strict=True))
        weights = sum(self._opened(port.get_node()) for known, port in zip(fixed, inputs, strict=True) if known)
        made = self._number(node.output(0))
        shape = node.get_output_shape(0)
        if kind in _POINTWISE:
            return Layer("pointwise", reads, made, weights)
        if kind == "ReduceSum" and attributes["keep_dims"] and fixed[1]:
            return Layer("reduce", reads[:1], made)
        if kind == "Convolution":
            rows = inputs[1].get_shape()[2]
            padding = attributes["pads_begin"][0], attributes["pads_end"][0]
            plain = set(attributes["strides"]) == set(attributes["dilations"]) == {1}
            if plain and attributes["auto_pad"] == "explicit" and rows % 2 and padding == (rows // 2, rows // 2):
                return Layer("conv", reads[:1], made, weights, halo=rows // 2)
        elif kind == "Interpolate":
            before = inputs[0].get_shape()
            upright = shape[2] % before[2] == 0 and list(shape[:2]) == list(before[:2])
            by_scale = attributes["shape_calculation_mode"] == "scales" and attributes["mode"] == "nearest"
            if upright and by_scale and attributes["coordinate_transformation_mode"] != "align_corners":
                return Layer("upsample", reads[:1], made)
        elif kind == "GroupNormalization":
            gamma, beta = (_numbers(port.get_node()) for port in inputs[1:])
            norm = Norm(int(attributes["num_groups"]), float(attributes["epsilon"]), gamma, beta)
            return Layer("norm", reads[:1], made, norm=norm)
        elif kind in _RESHAPING:
            return Layer("reshape", reads[:1], made)
        elif kind == "Transpose" and fixed[1]:
            return Layer("transpose", reads[:1], made, order=tuple(int(i) for i in _numbers(inputs[1].get_node())))
        elif kind == "Softmax":
            return Layer("softmax", reads, made, axis=int(attributes["axis"]))
        elif kind == "MatMul":
            transposed = attributes["transpose_a"], attributes["transpose_b"]
            return Layer("matmul", reads, made, weights, transposed=transposed)
        name = node.get_friendly_name()
        raise InputError(f"{self.file.path}: {name}: found {kind} {attributes}, which strips of rows cannot compute")

    def _opened(self, node: Any) -> int:
        """Return the bytes of a weight, as opened."""
        if node.get_type_name() == "Constant":
            return opened_bytes(node)
        return sum(self._opened(port.get_node()) for port in node.input_values())

    def _cut(self) -> None:
        """Make the models of all segments, once: this rewires the model."""
        layers = self.plan.network.layers
        place = {i: index for index, segment in enumerate(self.plan.segments) for i in segment.layers}
        owner = {node.get_instance_id(): place[i] for i, node in enumerate(self._nodes)}
        feeds: list[dict[int, Any]] = [{} for _ in self.plan.segments]
        for value, port in enumerate(self._ports):
            maker = owner.get(port.get_node().get_instance_id())
            for target in port.get_target_inputs():
                user = owner.get(target.get_node().get_instance_id())
                if user is not None and user != maker:
                    if value not in feeds[user]:
                        feeds[user][value] = opset13.parameter(port.get_shape(), port.get_element_type())
                    target.replace_source_output(feeds[user][value].output(0))
        ends = {value: self._ports[value] for segment in self.plan.segments for value in segment.makes}
        affine: dict[int, list[Any]] = {}
        for i, node in enumerate(self._nodes):
            layer = layers[i]
            shape = self.plan.network.shapes[layer.makes]
            if layer.kind == "norm":
                factors = [opset13.parameter([1, shape[1], *(1 for _ in shape[2:])], np.float32) for _ in range(2)]
                scaled = opset13.multiply(node.input_value(0), factors[0])
                self._replace(node, opset13.add(scaled, factors[1]), ends)
                affine[i] = factors
            elif layer.kind == "reshape":
                pattern = [-1 if axis == self.plan.rows[layer.makes].axis else size for axis, size in enumerate(shape)]
                self._replace(node, opset13.reshape(node.input_value(0), np.array(pattern), special_zero=False), ends)
        for index, segment in enumerate(self.plan.segments):
            parameters = [*feeds[index].values(), *(one for i in segment.norms for one in affine[i])]
            results = [opset13.result(ends[value]) for value in segment.makes]
            model = openvino.Model(results, parameters, self._model.get_friendly_name())
            self._pieces.append(_Piece(model, tuple(feeds[index]), segment.norms, segment.makes))

    @staticmethod
    def _replace(node: Any, other: Any, ends: dict[int, Any]) -> None:
        """Let everything read another node instead of this one."""
        old = node.get_instance_id()
        node.output(0).replace(other.output(0))
        for value, port in ends.items():
            if port.get_node().get_instance_id() == old:
                ends[value] = other.output(0)

    def piece(self, index: int, rows: int) -> _Piece:
        """Return a segment's model with the sizes of strips of so many rows."""
        one, segment = self._pieces[index], self.plan.segments[index]
        ports = one.model.inputs[: len(one.values)]
        one.model.reshape({
            port: list(self.plan.strip_shape(value, segment, rows))
            for port, value in zip(ports, one.values, strict=True)
        })  # fmt: skip
        return one


def _numbers(node: Any) -> Array:
    """Return the numbers of a constant, or of one that is converted."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise InputError(f"{node.get_friendly_name()}: found {node.get_type_name()}, expected a constant")
    return np.asarray(node.data, np.float32)


class OpenedSegment:
    """A compiled segment, as strip_runner.Opened."""

    def __init__(self, graph: OpenVinoStrips, index: int, rows: int) -> None:
        self._file, self._piece = graph.file, graph.piece(index, rows)
        compiled = graph.file.compiled(self._piece.model, part=True)
        self._request: openvino.InferRequest | None = compiled.model.create_infer_request()

    def __call__(self, values: Mapping[int, Array], affine: Mapping[int, tuple[Array, Array]]) -> dict[int, Array]:
        """Return what the segment makes of a strip."""
        request, piece = self._request, self._piece
        assert request is not None  # it is not closed
        shapes = [port.get_shape() for port in piece.model.inputs[len(piece.values) :]]
        numbers: Sequence[Array] = [one for norm in piece.norms for one in affine[norm]]
        feed = [values[value] for value in piece.values]
        feed += [one.reshape(shape) for one, shape in zip(numbers, shapes, strict=True)]
        try:
            request.infer(dict(enumerate(feed)), share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise self._file.failed(error, feed) from None
        return {value: request.get_output_tensor(i).data for i, value in enumerate(piece.makes)}

    def close(self) -> None:
        """Free the compiled model."""
        self._request = None
