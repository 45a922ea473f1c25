"""Runs ONNX networks in ONNX Runtime, with numpy inputs and outputs.

Needs onnxruntime and tokenizers, not torch. The INT4 weights are DequantizeLinear + MatMul pairs, which ONNX Runtime
fuses to MatMulNBits. providers.py chooses where it computes, prepack.py keeps prepacked weights on disk. I/O binding
and the providers' own options are not used. It was executed only on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.heap import returned, trim
from edgeprune.common.threads import usable
from edgeprune.runtimes import prepack
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.external import check_external
from edgeprune.runtimes.gpu import nvml_row
from edgeprune.runtimes.mapped import evicting
from edgeprune.runtimes.memory import Reading
from edgeprune.runtimes.networks import Engine, Network, NetworkBackend, Shapes, WholeEngine, files_of, room_here
from edgeprune.runtimes.pieces import Needs, UncountableError
from edgeprune.runtimes.piecewise import PiecewiseNetwork
from edgeprune.runtimes.providers import Choice, choose

if TYPE_CHECKING:
    from edgeprune.runtimes.onnx_graph import OnnxGraph, Piece

with needs("onnx"):
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as vendor

Options = Callable[[], onnxruntime.SessionOptions]
"""Creates new session options at each call."""
_FILE = "model.onnx"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the external data of a model is that is given as bytes."""
_ACCURACY = "session.qdq_matmulnbits_accuracy_level"
_VENDOR_ERRORS = (
    vendor.EPFail,
    vendor.Fail,
    vendor.InvalidArgument,
    vendor.InvalidGraph,
    vendor.InvalidProtobuf,
    vendor.NoModel,
    vendor.NoSuchFile,
    vendor.NotImplemented,
    vendor.RuntimeException,
)
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OrtNetwork:
    """One ONNX file, with inputs and outputs by name.

    Args:
        path: the file.
        options: creates new session options at each call.
        choice: where to compute.
        cache_dir: where prepacked weights are kept; None does not prepack.

    Raises:
        InputError: the file is missing, damaged or not ONNX, the requested provider does not start, or the cache
            cannot be written.
    """

    def __init__(self, path: Path, options: Options, choice: Choice, cache_dir: Path | None = None) -> None:
        _check(path)
        with _opening(path):
            if cache_dir is None:
                with evicting(Path(f"{path}.data")):
                    session = _session(path, options(), choice)
            else:
                session = _prepacked_session(path, options, choice, cache_dir)
        self._session: onnxruntime.InferenceSession | None = session
        self._path = path
        self._inputs = {i.name: _TYPES.get(i.type, np.float32) for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self.provider: str = session.get_providers()[0]
        self.why = choice.started(self.provider)

    def largest_batch(self, name: str) -> None:
        """Return None: the sizes of an export's models are dynamic."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        if self._session is None:
            raise InputError("the runtime is closed; load the folder again")
        missing = set(self._inputs) - set(arrays)
        if missing:
            raise InputError(f"{self._path}: inputs: the model also needs {sorted(missing)}, found {sorted(arrays)}")
        feed = {name: np.asarray(arrays[name], dtype) for name, dtype in self._inputs.items()}
        values = _ran(self._path, self._session, self._outputs, feed)
        return {k: np.asarray(v, np.float32) for k, v in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        """Drop the session; ONNX Runtime then frees its memory."""
        self._session = None


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
        from edgeprune.runtimes.onnx_graph import input_kinds, read_model

        names = _check(path)
        if len(names) > 1:
            found = ", ".join(sorted(names))
            raise UncountableError(f"{path}: external data: found {found}, expected one file; export again")
        self._data = (path.parent / next(iter(names), path.name)).resolve()
        self._path, self._options, self._choice, self._int8 = path, options, choice, int8
        self.device, self.why = choice.providers[0], choice.why
        self._model = read_model(path)
        self.kinds = input_kinds(self._model)
        """The type of each input, by name."""

    def graph(self, shapes: Mapping[str, Sequence[int]], *, sliced: bool = True) -> OnnxGraph:
        """Return the operations of the model with inputs of these shapes.

        Args:
            shapes: of each input.
            sliced: compute attention in slices; the whole model does not.

        Raises:
            InputError: an input is missing, the model does not take one of this shape, or it cannot be counted.
        """
        from edgeprune.runtimes.onnx_graph import OnnxGraph

        scales = 3 if self._int8 else 1  # packed with the weights, and with their sums
        return OnnxGraph(self._path, self._model, shapes, self._data, sliced=sliced, scales=scales)

    def opened(self, part: Piece) -> OrtPiece:
        """Open a part of a graph. Its weights are mapped from the file of the whole."""
        options = self._options()
        options.add_session_config_entry(_DATA_FOLDER, str(self._data.parent))
        with _opening(self._path), evicting(self._data):
            return OrtPiece(self._path, _session(part.model, options, self._choice), part)

    def close(self) -> None:
        """Do nothing: parts are closed by themselves."""


class OrtPiece:
    """A part of a model that is ready to run."""

    def __init__(self, path: Path, session: onnxruntime.InferenceSession, part: Piece) -> None:
        self._path, self._session, self._part = path, session, part

    def __call__(self, feed: Sequence[Any]) -> Sequence[Any]:
        """Return all outputs, in their order, for all inputs in theirs."""
        named = dict(zip(self._part.inputs, feed, strict=True))
        return _ran(self._path, self._session, self._part.outputs, named)

    def rest(self) -> None:
        """Do nothing: without an arena, values are freed when they were read."""


def _check(path: Path) -> set[str]:
    """Return the names of a model's data files.

    Raises:
        InputError: the model is missing or damaged, or one of these files is not as the model says.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file, expected an ONNX model; export again")
    return check_external(path)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Map ONNX Runtime's errors; afterwards, nothing is left of the copies that it makes of weights.

    Without `returned`, opening 1.5 GB of INT4 weights peaked at 3.0 GB, of which 1.4 GB stayed in the heap; with it, at
    1.8 GB, and it was no slower.
    """
    try:
        with returned():
            yield
    except _VENDOR_ERRORS as error:
        raise InputError(f"{path}: ONNX Runtime cannot open it: {_line(error)}; export again") from None
    finally:
        trim()


def _ran(
    path: Path, session: onnxruntime.InferenceSession, outputs: Sequence[str], feed: Mapping[str, Any]
) -> Sequence[Any]:
    try:
        with returned():
            values: Sequence[Any] = session.run(list(outputs), dict(feed))
    except _VENDOR_ERRORS as error:
        shapes = {k: v.shape for k, v in feed.items()}
        raise InputError(f"{path}: ONNX Runtime failed: {_line(error)}; inputs were {shapes}") from None
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _session(model: Path | bytes, options: onnxruntime.SessionOptions, choice: Choice) -> onnxruntime.InferenceSession:
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=list(choice.providers))


def _prepacked_session(path: Path, options: Options, choice: Choice, cache_dir: Path) -> onnxruntime.InferenceSession:
    """Open the prepacked copy; if ONNX Runtime rejects it, make it again once."""
    config = {"accuracy_level": options().get_session_config_entry(_ACCURACY)}
    for attempt in range(2):
        copy = prepack.prepacked(path, cache_dir, config, options)
        as_is = options()
        as_is.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _session(copy, as_is, choice)
        except _VENDOR_ERRORS:
            prepack.forget(copy)
            if attempt:
                raise
    raise AssertionError("unreachable")


def session_options(*, accuracy_level: int = 1, threads: int = 0, reuse: bool = True) -> onnxruntime.SessionOptions:
    """Return session options that favour exactness and low memory.

    On random SD3.5-Large weights level 4 had a relative error of 4.5e-3, level 1 of 2.6e-7, and level 4 was not faster.

    Args:
        accuracy_level: MatMulNBits computes in float32 at 1, in int8 at 4.
        threads: threads inside one operator; 0 for as many as affinity, quota and cores allow.
        reuse: give values the buffers of others that were read. These stay until the last value: 277 instead of 102 MB
            for a block of SD3.5 Large at 512x512, in the same time.

    Raises:
        InputError: the accuracy level is not one of 0 to 4, or threads are below 0.
    """
    if accuracy_level not in range(5):
        raise InputError(f"accuracy_level: found {accuracy_level}, expected 0 to 4")
    if threads < 0:
        raise InputError(f"threads: found {threads}, expected 0 or more")
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or usable()
    # An arena never frees the largest step's activations; a memory pattern is useless because image sizes change.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.enable_mem_reuse = reuse
    options.log_severity_level = 3
    options.add_session_config_entry(_ACCURACY, str(accuracy_level))
    return options


@dataclass(frozen=True)
class CpuEngine:
    """Opens networks on the CPU, whole or in pieces."""

    options: Options
    choice: Choice
    activations: str
    limited: bool
    """Whether the user named a limit."""
    name: str = "ort"
    counts_values: bool = True

    def open(self, folder: Path, limit: int | None) -> Network:
        """Open a network: whole, or in pieces."""
        if limit is None:
            return OrtNetwork(folder / _FILE, self.options, self.choice)
        return PiecewiseNetwork(self._file(folder), limit)

    def _file(self, folder: Path) -> OrtFile:
        return OrtFile(folder / _FILE, self.options, self.choice, int8=self.activations == "int8")

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes that a network takes; it is read, without its weights.

        Raises:
            InputError: a limit was named, and what the network takes cannot be counted.
        """
        try:
            file = self._file(folder)
            whole, least = (file.graph(shapes, sliced=sliced).measured().needs() for sliced in (False, True))
        except UncountableError:
            if self.limited:
                raise
            return files_of(folder)
        return Needs(whole.whole, least.least)

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has now, and may have at most."""
        return room_here()

    def memory(self) -> dict[str, Reading]:
        """Return nothing: the process has the memory."""
        return {}


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    provider: str | None = None,
    accuracy_level: int = 1,
    threads: int = 0,
    cache_dir: str | Path | None = None,
    memory: int | None = None,
    keep_embeddings: str | Path | None = None,
) -> NetworkBackend:
    """Open an export folder.

    Args:
        folder: an export of format onnx.
        settings: that folder's settings.
        provider: cuda, tensorrt, coreml, openvino or cpu; None takes the first of these that is present.
        accuracy_level: see `session_options`.
        threads: threads inside one operator; 0 for as many as affinity, quota and cores allow.
        cache_dir: keeps prepacked weights there and maps them (CPU only). The first start creates them, which takes
            more time and memory.
        memory: most bytes of the process; None takes most of what is free. Networks whose files do not fit together
            are open one after the other.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.

    Raises:
        InputError: a file is missing, damaged or not as the export wrote it, or an option does not fit.
    """
    # A cache implies the CPU: weights are prepacked only there.
    choice = choose(onnxruntime.get_available_providers(), "cpu" if cache_dir and not provider else provider)
    options = functools.partial(
        session_options, accuracy_level=accuracy_level, threads=threads, reuse=choice.name != "cpu"
    )
    options()  # checks the options before anything is opened
    if cache_dir is not None and choice.name != "cpu":
        raise InputError(f"cache_dir: found it for {choice.providers[0]}, expected it for provider=cpu only")
    if cache_dir is not None and memory is not None:
        raise InputError("cache_dir: found it with memory, expected one of them: prepacked weights are opened whole")
    activations = "int8" if accuracy_level == 4 else "fp32"
    engine: Engine
    if choice.name == "cpu" and cache_dir is None:
        engine = CpuEngine(options, choice, activations, limited=memory is not None)
    else:
        cache = None if cache_dir is None else Path(cache_dir)
        engine = WholeEngine(
            "ort",
            lambda path: OrtNetwork(path / _FILE, options, choice, cache),
            activations=activations,
            rows=nvml_row if choice.name in ("tensorrt", "cuda") else dict,
        )
    return NetworkBackend(engine, folder, settings, memory=memory, keep_embeddings=keep_embeddings)
