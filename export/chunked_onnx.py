"""Runs an ONNX file of any size in ONNX Runtime, chunk by chunk, with the weights of one chunk in memory.

    ChunkedOnnx(path, session).run(names, feeds)

The nodes are in execution order. They are cut where the weights of a chunk reach `limit`. Each chunk is a model of its
own: its inputs are the values it reads from earlier chunks, its outputs the values that later ones read, and its
weights stay in the original file. A small file is one chunk. This is for comparing, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from edgeprune.export.unfinished import SCRATCH

CHUNK_BYTES = 150_000_000
_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


class Session(Protocol):
    """The methods of onnxruntime.InferenceSession that are used here."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """Return the outputs of these names; all for None."""


class ChunkedOnnx:
    """An ONNX file as a chain of smaller models.

    Args:
        path: the file, with its weights inside it or in a file next to it.
        session: opens a file in ONNX Runtime.
        limit: bytes of weights in a chunk.
    """

    def __init__(self, path: Path, session: Callable[[Path], Session], *, limit: int = CHUNK_BYTES) -> None:
        self._session = session
        model = onnx.load(str(path), load_external_data=False)
        self._outputs = [value.name for value in model.graph.output]
        self.chunks = _cut(model, limit)
        self._whole = session(path) if len(self.chunks) == 1 else None
        self._path, self._types = path, {}
        if self._whole is None:
            # The nodes of quantised layers carry no types of their own.
            model = onnx.shape_inference.infer_shapes(model)
            values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
            self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._model = model

    @property
    def steps(self) -> int:
        """The number of chunks, which run one after the other."""
        return len(self.chunks)

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = lambda: None
    ) -> list[NDArray[Any]]:
        """Return the outputs of these names, or all; call `step` after each chunk."""
        if self._whole is not None:
            results = self._whole.run(names, feeds)
            step()
            return list(results)
        values, last = dict(feeds), _last_use(self.chunks, self._outputs)
        for index, nodes in enumerate(self.chunks):
            read = {name for node in nodes for name in node.input}
            computed = {name for node in nodes for name in node.output}
            outputs = [name for name in computed if last.get(name, -1) > index]
            chunk = self._chunk_model(nodes, sorted(read & set(values)), outputs)
            values |= zip(outputs, self._run(chunk, read, outputs, values), strict=True)
            for name in [n for n in values if last.get(n, -1) <= index]:
                del values[name]
            step()
        return [values[name] for name in names or self._outputs]

    def _chunk_model(self, nodes: Sequence[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        """Build a chunk's model, which refers to the weights in the original file."""
        read = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in self._model.graph.initializer if tensor.name in read]

        def info(name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, self._types[name], None)

        graph = onnx.helper.make_graph(nodes, "chunk", [info(n) for n in inputs], [info(n) for n in outputs], weights)
        return onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)

    def _run(
        self, chunk: onnx.ModelProto, read: set[str], outputs: list[str], values: Mapping[str, Any]
    ) -> Sequence[Any]:
        # In the file's folder: ONNX Runtime reads no weights from outside a model's folder.
        file = self._path.with_name(SCRATCH + self._path.name)
        try:
            file.write_bytes(chunk.SerializeToString())  # and closes it: Windows opens no file twice
            return self._session(file).run(outputs, {name: value for name, value in values.items() if name in read})
        finally:
            file.unlink(missing_ok=True)


def _cut(model: onnx.ModelProto, limit: int) -> list[list[onnx.NodeProto]]:
    """Cut the nodes into chunks; a weight counts where it is first read."""
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


def _last_use(chunks: Sequence[Sequence[onnx.NodeProto]], outputs: Sequence[str]) -> dict[str, int]:
    """Map each value to the last chunk that reads it; outputs are read after all chunks."""
    last = {name: i for i, nodes in enumerate(chunks) for node in nodes for name in node.input}
    return last | dict.fromkeys(outputs, len(chunks))
