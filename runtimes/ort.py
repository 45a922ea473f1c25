"""ONNX networks in ONNX Runtime, numpy in and out.

Needs onnxruntime and tokenizers, not torch. The INT4 weights are DequantizeLinear + MatMul pairs that ONNX
Runtime fuses to MatMulNBits. providers.py chooses where it computes, prepack.py keeps prepacked weights on disk.
What it leaves out: I/O binding, providers' own options. Executed on the CPU only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.runtimes import prepack
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.external import check_external
from edgeprune.runtimes.gpu import nvml_row
from edgeprune.runtimes.mapped import given_back
from edgeprune.runtimes.networks import NetworkBackend
from edgeprune.runtimes.providers import Choice, choose

with needs("onnx"):
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as vendor

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
    """One ONNX file, called by input name, answering by output name, its errors mapped to ours.

    Args:
        path: the file.
        options: makes a session's options, anew each time.
        choice: where to compute.
        cache_dir: where prepacked weights are kept, or None for none.

    Raises:
        InputError: the file is missing, damaged or no ONNX, the provider that was asked for does not start, or the
            cache cannot be written.
    """

    def __init__(
        self,
        path: Path,
        options: Callable[[], onnxruntime.SessionOptions],
        choice: Choice,
        cache_dir: Path | None = None,
    ) -> None:
        if not path.exists():
            raise InputError(f"{path}: found no file, expected an ONNX model; export again")
        check_external(path)
        try:
            if cache_dir is None:
                with given_back(Path(f"{path}.data")):
                    session = _session(path, options(), choice)
            else:
                session = _prepacked_session(path, options, choice, cache_dir)
        except _VENDOR_ERRORS as error:
            raise InputError(f"{path}: found {_line(error)}, expected a whole ONNX model; export again") from None
        self._session: onnxruntime.InferenceSession | None = session
        self._path = path
        self._inputs = {i.name: _TYPES.get(i.type, np.float32) for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self.provider: str = session.get_providers()[0]
        self.why = choice.started(self.provider)

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Outputs by name, float32."""
        if self._session is None:
            raise InputError("runtime: found it closed, expected an open one")
        missing = set(self._inputs) - set(arrays)
        if missing:
            raise InputError(f"{self._path}: inputs: found also {sorted(missing)}, expected {sorted(arrays)}")
        feed = {name: np.asarray(arrays[name], dtype) for name, dtype in self._inputs.items()}
        try:
            values = self._session.run(None, feed)
        except _VENDOR_ERRORS as error:
            shapes = {k: v.shape for k, v in feed.items()}
            raise InputError(f"{self._path}: found {_line(error)}; inputs were {shapes}") from None
        return {k: np.asarray(v, np.float32) for k, v in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees its memory."""
        self._session = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _session(path: Path, options: onnxruntime.SessionOptions, choice: Choice) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), options, providers=list(choice.providers))


def _prepacked_session(
    path: Path, options: Callable[[], onnxruntime.SessionOptions], choice: Choice, cache_dir: Path
) -> onnxruntime.InferenceSession:
    """A session on the prepacked copy, which is made again if ONNX Runtime does not take it."""
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


def session_options(*, accuracy_level: int = 1, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options that favour exactness and little memory.

    On random SD3.5-Large weights level 4 had a relative error of 4.5e-3 against 2.6e-7 at level 1, and was not faster.

    Args:
        accuracy_level: of MatMulNBits: 1 computes in float32, 4 in int8.
        threads: inside one operator; 0 lets ONNX Runtime take one per core.

    Raises:
        InputError: the accuracy level is none of 0 to 4.
    """
    if accuracy_level not in range(5):
        raise InputError(f"accuracy_level: found {accuracy_level}, expected 0 to 4")
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    # An arena keeps the largest step's activations for good; image sizes change, so a pattern would not be reused.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry(_ACCURACY, str(accuracy_level))
    return options


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    provider: str | None = None,
    accuracy_level: int = 1,
    threads: int = 0,
    cache_dir: str | Path | None = None,
    low_memory: bool = False,
) -> NetworkBackend:
    """Open an export folder.

    Args:
        folder: an export of format onnx.
        settings: of that folder.
        provider: cuda, tensorrt, coreml, openvino or cpu; None for the first of these that is here.
        accuracy_level: of MatMulNBits, see `session_options`.
        threads: inside one operator; 0 for one per core.
        cache_dir: on the CPU, keeps prepacked weights there and maps them. The first start makes them, which takes
            more time and memory.
        low_memory: hold one stage's networks at a time.

    Raises:
        InputError: a file is missing, truncated or not what the export writes, or an option does not fit.
    """
    # Only the CPU's weights are repacked.
    choice = choose(onnxruntime.get_available_providers(), "cpu" if cache_dir and not provider else provider)
    options = functools.partial(session_options, accuracy_level=accuracy_level, threads=threads)
    options()  # before anything is opened
    if cache_dir is not None and choice.name != "cpu":
        raise InputError(f"cache_dir: found it for {choice.providers[0]}, expected it for provider=cpu only")
    cache = None if cache_dir is None else Path(cache_dir)
    return NetworkBackend(
        "ort",
        folder,
        settings,
        lambda path: OrtNetwork(path / "model.onnx", options, choice, cache),
        low_memory=low_memory,
        memory=nvml_row if choice.name in ("tensorrt", "cuda") else dict,
    )
