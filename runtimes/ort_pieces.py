"""Opens parts of an ONNX model in ONNX Runtime on the CPU. Their weights stay in the file of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.common.extras import needs
from edgeprune.common.pieces import UncountableError
from edgeprune.common.read_ahead import read_ahead
from edgeprune.runtimes.mapped import evicting
from edgeprune.runtimes.onnx_graph import OnnxGraph, Piece, input_kinds, read_model
from edgeprune.runtimes.onnx_vae import OnnxStrips
from edgeprune.runtimes.ort_session import Options, check, opening, ran, session_of
from edgeprune.runtimes.providers import Choice

with needs("onnx"):
    import onnxruntime

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the external data of a model is that is given as bytes."""


class OrtFile:
    """One ONNX file, of which parts are opened on the CPU.

    Args:
        path: the file.
        options: creates new session options at each call.
        choice: the CPU.
        int8: activations are rounded to INT8.

    Raises:
        InputError: the file is missing, damaged or not ONNX, or it has several files of external data.
    """

    def __init__(self, path: Path, options: Options, choice: Choice, *, int8: bool = False) -> None:
        names = check(path)
        if len(names) > 1:
            found = ", ".join(sorted(names))
            raise UncountableError(f"{path}: external data: found {found}, expected one file; export again")
        self._data = (path.parent / next(iter(names), path.name)).resolve()
        self.path, self._options, self._choice, self._int8 = path, options, choice, int8
        self.device, self.why = choice.providers[0], choice.why
        self._model = read_model(path)
        self.kinds = input_kinds(self._model)
        """The type of each input, by name."""

    def graph(self, shapes: Mapping[str, Sequence[int]], *, sliced: bool = True) -> OnnxGraph:
        """Return the operations of the model with inputs of these shapes.

        Args:
            shapes: of each input.
            sliced: as pieces compute it, with attention in slices; False: as the whole file is computed.

        Raises:
            InputError: an input is missing, the model does not take one of this shape, or it cannot be counted.
        """
        scales = 3 if self._int8 else 1  # packed with the weights, and with their sums
        return OnnxGraph(self.path, self._model, shapes, self._data, sliced=sliced, scales=scales)

    def opened(self, part: Piece) -> OrtPiece:
        """Open a part of a graph. Its weights are mapped from the file of the whole."""
        options = self._options()
        options.add_session_config_entry(_DATA_FOLDER, str(self._data.parent))
        with opening(self.path), evicting(self._data):
            return OrtPiece(self.path, session_of(part.model, options, self._choice), part)

    def ahead(self, part: Piece) -> None:
        """Ask the operating system to read the weights of a part, which is opened soon."""
        read_ahead(self._data, part.spans)

    def strips(self, shape: Sequence[int]) -> OnnxStrips:
        """Return a VAE's decoder for latents of this shape, in segments.

        Raises:
            InputError: strips cannot compute it.
        """
        return OnnxStrips(self.path, self._model, shape, self._data, self.opened)

    def close(self) -> None:
        """Do nothing: parts are closed by themselves."""


class OrtPiece:
    """A part of a model that is ready to run."""

    def __init__(self, path: Path, session: onnxruntime.InferenceSession, part: Piece) -> None:
        self._path, self._session, self._part = path, session, part

    def __call__(self, feed: Sequence[Any]) -> Sequence[Any]:
        """Return all outputs, in their order, for all inputs in theirs."""
        named = dict(zip(self._part.inputs, feed, strict=True))
        return ran(self._path, self._session, self._part.outputs, named)

    def rest(self) -> None:
        """Do nothing: without an arena, values are freed when they were read."""
