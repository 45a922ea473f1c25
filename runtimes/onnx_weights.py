"""What of an ONNX graph depends on no input: weights, sizes, and what is made of them when a part is opened.

Parts refer to the data file of the whole, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.extras import needs
from edgeprune.runtimes.onnx_sizes import Sizing

with needs("onnx"):
    import onnx
    from onnx import helper, numpy_helper

_EXTERNAL = onnx.TensorProto.EXTERNAL


class Weights:
    """The fixed values of a graph, by name.

    Args:
        model: its ModelProto.
        sizing: its values.
        data: the file with all of its external data, links resolved.
    """

    def __init__(self, model: Any, sizing: Sizing, data: Path) -> None:
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sizing, self._data = sizing, data
        self.makers: dict[str, Any] = dict.fromkeys((*self._stored, *sizing.numbers))
        """The node that makes each fixed value; None for weights and numbers."""

    def __contains__(self, name: str) -> bool:
        return name in self.makers

    def is_stored(self, name: str) -> bool:
        """Return whether the file has this value."""
        return name in self._stored

    def add(self, tensor: Any) -> None:
        """Add a weight that the file does not have."""
        self._stored[tensor.name] = tensor
        self.makers[tensor.name] = None

    def make(self, node: Any) -> None:
        """Let each part that reads what this node makes compute it."""
        self.makers |= dict.fromkeys(node.output, node)

    def read_by(self, node: Any) -> bool:
        """Return whether a node reads nothing else."""
        return all(name in self.makers for name in node.input if name)

    def behind(self, names: Iterable[str]) -> tuple[list[Any], list[Any]]:
        """Return the nodes that make fixed values of these names, in order, and the weights and numbers behind them."""
        nodes: dict[str, Any] = {}
        weights: dict[str, Any] = {}

        def add(name: str) -> None:
            if name not in self.makers or name in weights or name in nodes:
                return
            maker = self.makers[name]
            if maker is not None:
                for one in maker.input:
                    add(one)
                nodes.update(dict.fromkeys(maker.output, maker))
            elif name in self._stored:
                weights[name] = self._referring(self._stored[name])
            else:
                weights[name] = numpy_helper.from_array(self._sizing.numbers[name], name)

        for name in names:
            add(name)
        return list({id(node): node for node in nodes.values()}.values()), list(weights.values())

    def _referring(self, tensor: Any) -> Any:
        """Return a weight that refers to the data file by its own name: in a hub's cache, the model's is a link."""
        if tensor.data_location != _EXTERNAL:
            return tensor
        out = onnx.TensorProto()
        out.CopyFrom(tensor)
        for entry in out.external_data:
            if entry.key == "location":
                entry.value = self._data.name
        return out

    def array(self, name: str) -> Any:
        """Return a weight of the file; a mapped array if it is external."""
        tensor, kind = self._stored[name], self._sizing.kinds[name]
        if tensor.data_location != _EXTERNAL:
            return numpy_helper.to_array(tensor)
        entry = {one.key: one.value for one in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(kind.element)
        return np.memmap(self._data, dtype, "r", int(entry.get("offset", "0")), kind.shape)


def spans(tensors: Iterable[Any]) -> list[tuple[int, int]]:
    """Return begin and end in the data file of those tensors that are in it."""
    entries = ({one.key: one.value for one in tensor.external_data} for tensor in tensors)
    places = ((int(entry.get("offset", 0)), int(entry["length"])) for entry in entries if "length" in entry)
    return [(begin, begin + length) for begin, length in places]
