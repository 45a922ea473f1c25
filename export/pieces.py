"""Runs an ONNX file of any size in ONNX Runtime: a slice of its nodes at a time, the weights of one in memory.

    Pieces(path, session).run(names, feeds)

Nodes are in the order they run in. They are cut where a slice's weights reach `limit`; each slice is a model of its own
that takes what it reads of the slices before and gives what those after it read. All slices together are the file, and
read its weights where they are. A small file is one slice. What it leaves out: speed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from edgeprune.export.unfinished import SCRATCH

PIECE_BYTES = 150_000_000
_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


class Session(Protocol):
    """The part of onnxruntime.InferenceSession that is used here."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """Outputs of these names."""


class Pieces:
    """An ONNX file as a chain of smaller ones.

    Args:
        path: the file, its weights inside or beside it.
        session: opens a file.
        limit: bytes of weights in a slice.
    """

    def __init__(self, path: Path, session: Callable[[Path], Session], *, limit: int = PIECE_BYTES) -> None:
        self._session = session
        model = onnx.load(str(path), load_external_data=False)
        self._outputs = [value.name for value in model.graph.output]
        self.slices = _cut(model, limit)
        self._whole = session(path) if len(self.slices) == 1 else None
        self._path, self._types = path, {}
        if self._whole is None:
            # The nodes that stand for quantised layers carry no types of their own.
            model = onnx.shape_inference.infer_shapes(model)
            values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
            self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._model = model

    @property
    def steps(self) -> int:
        """How many slices run one after the other."""
        return len(self.slices)

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = lambda: None
    ) -> list[NDArray[Any]]:
        """The outputs of these names, or all; `step` is called after each slice."""
        if self._whole is not None:
            found = self._whole.run(names, feeds)
            step()
            return list(found)
        values, last = dict(feeds), _last_use(self.slices, self._outputs)
        for index, nodes in enumerate(self.slices):
            read = {name for node in nodes for name in node.input}
            own = {name for node in nodes for name in node.output}
            outputs = [name for name in own if last.get(name, -1) > index]
            piece = self._piece(nodes, sorted(read & set(values)), outputs)
            values |= zip(outputs, self._run(piece, read, outputs, values), strict=True)
            for name in [n for n in values if last.get(n, -1) <= index]:
                del values[name]
            step()
        return [values[name] for name in names or self._outputs]

    def _piece(self, nodes: Sequence[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        """A slice as a model, its weights where they are."""
        read = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in self._model.graph.initializer if tensor.name in read]

        def info(name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, self._types[name], None)

        graph = onnx.helper.make_graph(nodes, "piece", [info(n) for n in inputs], [info(n) for n in outputs], weights)
        return onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)

    def _run(
        self, piece: onnx.ModelProto, read: set[str], outputs: list[str], values: Mapping[str, Any]
    ) -> Sequence[Any]:
        # Beside the file: data outside of a model's folder is not read.
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=SCRATCH, suffix=".onnx") as file:
            file.write(piece.SerializeToString())
            file.flush()
            session = self._session(Path(file.name))
            return session.run(outputs, {name: value for name, value in values.items() if name in read})


def _cut(model: onnx.ModelProto, limit: int) -> list[list[onnx.NodeProto]]:
    """The nodes in slices; weights are counted where they are first read."""
    sizes = {t.name: math.prod(t.dims) * _BITS.get(t.data_type, _bits(t)) // 8 for t in model.graph.initializer}
    out: list[list[onnx.NodeProto]] = [[]]
    filled = 0
    for node in model.graph.node:
        size = sum(sizes.pop(name, 0) for name in node.input)
        if out[-1] and filled + size > limit:
            out.append([])
            filled = 0
        out[-1].append(node)
        filled += size
    return out


def _bits(tensor: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) * 8


def _last_use(slices: Sequence[Sequence[onnx.NodeProto]], outputs: Sequence[str]) -> dict[str, int]:
    """By value, the last slice that reads it; outputs are read after all."""
    last = {name: i for i, nodes in enumerate(slices) for node in nodes for name in node.input}
    return last | dict.fromkeys(outputs, len(slices))
