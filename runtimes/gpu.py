"""The CUDA calls of the TensorRT runtime: device memory, copies, streams and captured graphs; and NVML's total.

`Gpu` contains everything that runtimes/trt.py needs from a GPU apart from TensorRT itself, so a test can pass a fake
`cuda`. Only the first GPU is used, and host memory is not pinned.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.common.memory import SHARE
from edgeprune.runtimes.memory import Reading


class Gpu:
    """The first CUDA device.

    Args:
        cuda: `cuda.bindings.runtime`, or a test's stand-in.

    Raises:
        InputError: there is no CUDA device, or its driver is too old.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.weights_bytes = self.allocated_bytes = 0
        """Bytes of the open engines, and of allocated buffers."""
        self._most = {"peak_bytes": 0, "weights_bytes": 0, "activations_bytes": 0}
        self._sizes: dict[int, int] = {}
        if not self.call("cudaGetDeviceCount"):
            raise InputError("CUDA: found no device, expected an NVIDIA GPU")
        self.call("cudaSetDevice", 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its value, or values, if it has any.

        Raises:
            InputError: CUDA reports an error.
        """
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            _, text = self._cuda.cudaGetErrorString(error)
            raise InputError(f"CUDA: {name} failed: {text.decode()} (error {int(error)})")
        return values[0] if len(values) == 1 else values or None

    def allocate(self, size: int) -> int:
        """Allocate device memory, at least one byte, and return its address.

        Raises:
            InputError: CUDA cannot allocate it.
        """
        try:
            pointer = int(self.call("cudaMalloc", max(size, 1)))
        except InputError as error:
            raise InputError(
                f"cannot allocate {size} bytes of GPU memory: {error}; {self.allocated_bytes} bytes are in use: "
                "try a smaller image or batch, or load with less memory=, so that networks take turns"
            ) from None
        self._sizes[pointer] = size
        self._count(allocated=size)
        return pointer

    def free(self, pointer: int) -> None:
        """Free memory that `allocate` returned."""
        self._count(allocated=-self._sizes.pop(pointer))
        self.call("cudaFree", pointer)

    def hold(self, size: int) -> None:
        """Count the bytes of an engine that was opened, or closed (negative)."""
        self._count(weights=size)

    def _count(self, *, weights: int = 0, allocated: int = 0) -> None:
        self.weights_bytes += weights
        self.allocated_bytes += allocated
        now = self.weights_bytes + self.allocated_bytes, self.weights_bytes, self.allocated_bytes
        self._most = {row: max(most, n) for (row, most), n in zip(self._most.items(), now, strict=True)}

    def upload(self, pointer: int, array: NDArray[Any], stream: Any) -> None:
        """Copy a contiguous array to the device. It must stay alive until `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: NDArray[Any], pointer: int, stream: Any) -> None:
        """Copy from the device into a contiguous array; its content is valid after `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    def stream(self) -> Any:
        """Create a stream; end it with `destroy_stream`."""
        return self.call("cudaStreamCreate")

    def synchronize(self, stream: Any) -> None:
        """Wait until all work on the stream is done; errors of that work are raised here."""
        self.call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self.call("cudaStreamDestroy", stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what `work` enqueues on the stream without running it; return the graph for `replay`."""
        self.call("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = self.call("cudaStreamEndCapture", stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return executable

    def replay(self, graph: Any, stream: Any) -> None:
        """Run a captured graph."""
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self.call("cudaGraphExecDestroy", graph)

    def room(self) -> tuple[int, int]:
        """Return the bytes of GPU memory that this process has, and may have at most: most of what is free."""
        free, _ = self.call("cudaMemGetInfo")
        held = self.weights_bytes + self.allocated_bytes
        return held, held + int(SHARE * free)

    def memory(self) -> dict[str, Reading]:
        """Return the rows of memory.SPLIT for the GPU; the runtime's overhead is there only if NVML reports it."""
        counted = "on the GPU, at one time: counted, not measured"
        rows = {
            "weights_bytes": Reading(
                self._most["weights_bytes"], f"open engines' files, weights and code, {counted}", "gpu"
            ),
            "activations_bytes": Reading(
                self._most["activations_bytes"],
                f"inputs, outputs and scratch memory given to TensorRT, {counted}",
                "gpu",
            ),
        }
        return with_overhead(
            rows,
            self._most["peak_bytes"],
            f"weights and activations, {counted}",
            self.weights_bytes + self.allocated_bytes,
            "CUDA's and TensorRT's own on the GPU: this process now (NVML) less what is counted",
        )


def with_overhead(rows: dict[str, Reading], peak: int, how: str, counted: int, overhead_how: str) -> dict[str, Reading]:
    """Add the peak and, if NVML reports the process's total, the runtime's overhead, which the peak then includes.

    Args:
        rows: weights and activations on the GPU.
        peak: peak of weights and activations, in bytes.
        how: how that peak was measured.
        counted: current bytes of weights and activations.
        overhead_how: how the overhead is measured.
    """
    total = nvml_row()
    overhead: dict[str, Reading] = {}
    if total:
        overhead_bytes = max(0, total["gpu_process_bytes"].bytes - counted)
        overhead["runtime_overhead_bytes"] = Reading(overhead_bytes, overhead_how, "gpu")
        peak, how = peak + overhead_bytes, f"{how}; and runtime overhead"
    else:
        how += "; without runtime overhead, which NVML does not report here"
    return rows | overhead | total | {"peak_bytes": Reading(peak, how, "gpu")}


def nvml_row() -> dict[str, Reading]:
    """Return the row `gpu_process_bytes`, or no row if NVML does not report it."""
    total = nvml_process_bytes()
    if total is None:
        return {}
    return {"gpu_process_bytes": Reading(total, "this process on the GPU now, CUDA's own part included (NVML)", "gpu")}


def open_gpu(extra: str) -> Gpu:
    """Open the first GPU of this machine.

    Args:
        extra: the extra of edgeprune that installs cuda-bindings, for the error message.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        InputError: there is no CUDA device, or its driver is too old.
    """
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise MissingExtraError("cuda-bindings", extra) from None
    return Gpu(cuda)


def nvml_process_bytes() -> int | None:
    """Return the bytes this process uses on the first GPU; None if NVML does not report them.

    It needs nvidia-ml-py. Jetsons and Windows drivers report nothing; in a container the process may have another id.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(0))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in running if p.pid == os.getpid()), None)
