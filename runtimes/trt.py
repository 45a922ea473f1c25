"""Runs TensorRT engines with numpy inputs and outputs, in `tensorrt` or `tensorrt_rtx`, whichever built them.

Inputs and outputs have device buffers that are reused while shapes stay the same; scratch memory is sized for these
shapes, not for the profile's largest. A read-only input that is the same array as before (the text embeddings, in every
step but the first) is not copied again. Latents are copied to the host once per step, because guidance and the
scheduler run in numpy. An engine that does not fit reads weights from the host's memory as it runs, if it was built for
that. Several GPUs and RTX's kernel cache are not supported.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.common.fields import whole_number
from edgeprune.common.files import read_json
from edgeprune.common.pieces import RESERVE, Needs
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.gpu import Gpu, open_gpu
from edgeprune.runtimes.memory import Reading
from edgeprune.runtimes.networks import NetworkBackend, Shapes, files_of

VENDORS = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""Packages that build and run engines, the preferred one first, with the extra that installs each. An engine runs only
in the package and version that built it."""


def first_vendor() -> Any | None:
    """Import the first of VENDORS that works; TensorRT's bindings may be installed without its libraries."""
    for name in VENDORS:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    return None


def vendor(name: str) -> Any:
    """Import one of VENDORS.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, VENDORS[name])
    return importlib.import_module(name)


def logger(trt: Any) -> Any:
    """Create a TensorRT logger that collects errors in `lines`; `take()` returns them on one line and clears them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind refuses super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

        def take(self) -> str:
            text = " ".join("; ".join(self.lines).split())
            self.lines.clear()
            return text[:400] or "no reason given"

    return Log()


class TrtNetwork:
    """One engine, with inputs and outputs by name; maps TensorRT's errors to InputError.

    Args:
        path: the engine's file.
        trt: the package that built it.
        gpu: the GPU it runs on.
        built_by: package and version that built it, for the error if the engine cannot be read.
        cuda_graph: record the engine's kernels once per shape and launch them together.
        limit: most bytes on the GPU; weights that do not fit are streamed from the host. None keeps all there.

    Raises:
        InputError: the file does not exist, or TensorRT cannot read it or has too little memory for it.
    """

    def __init__(
        self,
        path: Path,
        trt: Any,
        gpu: Gpu,
        *,
        built_by: str = "",
        cuda_graph: bool = False,
        limit: int | None = None,
    ) -> None:
        if not path.is_file() or not path.stat().st_size:
            raise InputError(f"{path}: no such file or an empty one, expected a TensorRT engine; export again")
        self._path, self._gpu, self._cuda_graph = path, gpu, cuda_graph
        self._log = logger(trt)
        self._runtime = trt.Runtime(self._log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise InputError(
                f"{path}: {trt.__name__} {trt.__version__} cannot read this engine: {self._log.take()}"
                f"{f'; it was built by {built_by}' if built_by else ''}; export again on this device"
            )
        self._size = path.stat().st_size
        """Bytes of it on the GPU."""
        if limit is not None:
            self._stream_weights(limit)
        self._own_graph = cuda_graph and not hasattr(trt, "CudaGraphStrategy")
        self._context = self._new_context(trt)
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs)[name] = np.dtype(
                trt.nptype(self._engine.get_tensor_dtype(name))
            )
        self._stream = gpu.stream()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pointers: dict[str, int] = {}
        self._scratch: int | None = None
        self._sent: dict[str, NDArray[Any]] = {}
        self._graph: Any = None
        gpu.hold(self._size)
        self.provider, self.why = trt.__name__, f"built by {built_by}"

    def _stream_weights(self, limit: int) -> None:
        """Keep as many weights on the GPU as fit beside the values of the profile's largest shapes."""
        streamable = self._engine.streamable_weights_size
        if not streamable:  # it was not built for that
            return
        self._engine.weight_streaming_budget_v2 = 0  # of which the memory of a context depends
        others = self._size - streamable + self._engine.device_memory_size_v2
        held, _ = self._gpu.room()
        budget = min(max(0, limit - RESERVE - held - others), streamable)
        self._engine.weight_streaming_budget_v2 = budget
        self._size += budget - streamable

    def _new_context(self, trt: Any) -> Any:
        """Create an execution context whose scratch memory the caller allocates."""
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cuda_graph and not self._own_graph:  # TensorRT for RTX captures by itself
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(managed)
        if context is None:
            raise InputError(f"{self._path}: TensorRT cannot create an execution context: {self._log.take()}")
        return context

    def largest_batch(self, name: str) -> int:
        """Return the most rows that an input takes, from the engine's profile."""
        _, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        return int(tuple(largest)[0])

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        if self._context is None:
            raise InputError("the runtime is closed; load the folder again")
        if missing := sorted(set(self._inputs) - set(arrays)):
            raise InputError(f"{self._path}: inputs: the engine also needs {missing}, found {sorted(arrays)}")
        inputs = {name: np.asarray(arrays[name]) for name in self._inputs}
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._reserve(shapes)
        kept = []  # the arrays must live until the stream is done with them
        for name, array in inputs.items():
            if array is self._sent.get(name):
                continue
            kept.append(np.ascontiguousarray(array, self._inputs[name]))
            self._gpu.upload(self._pointers[name], kept[-1], self._stream)
            self._sent.pop(name, None)
            if not array.flags.writeable:
                self._sent[name] = array
        self._launch()
        results = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), dtype) for name, dtype in self._outputs.items()
        }
        for name, result in results.items():
            self._gpu.download(result, self._pointers[name], self._stream)
        self._gpu.synchronize(self._stream)
        return {name: np.asarray(result, np.float32) for name, result in results.items()}

    def _launch(self) -> None:
        if self._graph is not None:
            self._gpu.replay(self._graph, self._stream)
            return
        self._enqueue()
        if self._own_graph:
            # The run above let TensorRT create what cannot be created during a capture.
            self._graph = self._gpu.capture(self._stream, self._enqueue)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise InputError(f"{self._path}: the engine failed: {self._log.take()}; inputs were {self._shapes}")

    def _reserve(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the input shapes and allocate all buffers for them."""
        for name, shape in shapes.items():
            least, _, largest = (tuple(x) for x in self._engine.get_tensor_profile_shape(name, 0))
            fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True))
            if not fits:
                raise InputError(
                    f"{self._path}: {name}: found the shape {shape}, expected one from {least} to {largest}, which the "
                    "engine was built for; choose another size or batch, or export for a device with a wider range"
                )
        self._release()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise InputError(f"{self._path}: {name}: TensorRT rejects the shape {shape}: {self._log.take()}")
        for name, dtype in {**self._inputs, **self._outputs}.items():
            size = int(np.prod(tuple(self._context.get_tensor_shape(name)), dtype=np.int64)) * dtype.itemsize
            self._pointers[name] = self._gpu.allocate(size)
            self._context.set_tensor_address(name, self._pointers[name])
        size = self._context.update_device_memory_size_for_shapes()
        self._scratch = self._gpu.allocate(size)
        self._context.set_device_memory(self._scratch, size)
        self._shapes = shapes

    def _release(self) -> None:
        """Free the buffers."""
        self._shapes = {}
        self._sent.clear()
        if self._graph is not None:
            self._gpu.destroy_graph(self._graph)
            self._graph = None
        for pointer in [*self._pointers.values(), *([self._scratch] if self._scratch is not None else [])]:
            self._gpu.free(pointer)
        self._pointers.clear()
        self._scratch = None

    def close(self) -> None:
        """Free buffers, context and weights; a second call does nothing."""
        if self._context is None:
            return
        self._release()
        self._context = self._engine = self._runtime = None
        self._gpu.destroy_stream(self._stream)
        self._gpu.hold(-self._size)


@dataclass(frozen=True)
class TrtEngine:
    """Opens the engines of an export."""

    trt: Any
    gpu: Gpu
    built_by: str
    activations: str
    streamable: Mapping[str, int]
    """The bytes of weights that an engine need not have on the GPU, by network."""
    cuda_graph: bool = False
    text_activations: str = "as built"
    """Each engine is built in the precision that suits it, and embeddings are kept by the engine's hash."""
    name: str = "trt"
    counts_values: bool = False

    def open(self, folder: Path, limit: int | None) -> TrtNetwork:
        """Open an engine: all on the GPU, or within a limit."""
        return TrtNetwork(
            folder / "model.engine", self.trt, self.gpu,
            built_by=self.built_by, cuda_graph=self.cuda_graph, limit=limit,
        )  # fmt: skip

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes of its file, and of what is in it besides weights; values are not counted."""
        whole = files_of(folder).whole
        return Needs(whole, max(0, whole - self.streamable.get(folder.name, 0)))

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has on the GPU now, and may have at most."""
        return self.gpu.room()

    def memory(self) -> dict[str, Reading]:
        """Return the rows of the GPU."""
        return self.gpu.memory()


_MOST_BYTES = 10**12


def _streamable(networks: Any, where: Path) -> dict[str, int]:
    """Return the bytes of weights that can be streamed, by network, from the networks of edgeprune_export.json."""
    known = networks.items() if isinstance(networks, dict) else ()
    streams = {name: network for name, network in known if isinstance(network, dict) and network.get("streams") is True}
    return {n: whole_number(v, "onnx_weight_bytes", f"{where}: {n}", most=_MOST_BYTES) for n, v in streams.items()}


def _activations(networks: Any) -> str:
    """Return what the transformer's engine computes in, by the networks of edgeprune_export.json."""
    transformer = networks.get("transformer") if isinstance(networks, dict) else None
    whole = isinstance(transformer, dict) and transformer.get("precision") == "float32"
    return "fp32" if whole else "fp16"


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    cuda_graph: bool = False,
    memory: int | None = None,
    keep_embeddings: str | Path | None = None,
) -> NetworkBackend:
    """Open an export folder.

    Args:
        folder: an export of format trt.
        settings: that folder's settings.
        cuda_graph: record each engine's kernels once per shape and launch them together.
        memory: most bytes on the GPU; None takes most of what is free. Networks whose files do not fit together
            are open one after the other, and weights of an engine that does not fit alone are streamed.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.

    Raises:
        MissingExtraError: the TensorRT that built the folder, or cuda-bindings, is not installed.
        InputError: there is no GPU, or a file is missing, damaged or built by another TensorRT.
    """
    path = folder / "edgeprune_export.json"
    exported = read_json(path)
    builder, networks = exported.get("builder"), exported.get("networks")
    if not isinstance(builder, dict) or builder.get("name") not in VENDORS:
        raise InputError(f"{path}: builder: found {builder!r}, expected the name {' or '.join(VENDORS)} and a version")
    name = builder["name"]
    trt = vendor(name)
    gpu = open_gpu(VENDORS[name])
    engine = TrtEngine(
        trt=trt,
        gpu=gpu,
        built_by=f"{name} {builder.get('version')}",
        activations=_activations(networks),
        streamable=_streamable(networks, path),
        cuda_graph=cuda_graph,
    )
    return NetworkBackend(engine, folder, settings, memory=memory, keep_embeddings=keep_embeddings)
