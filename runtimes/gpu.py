"""The CUDA calls of the TensorRT runtime: device memory, copies, streams, captured graphs; and NVML's total.

All that runtimes/trt.py asks of a GPU, apart from TensorRT itself, is in `Gpu`, so that a test can put a fake `cuda`
under it. What it leaves out: several GPUs (the first one is taken), pinned host memory, kernels of our own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.runtimes.memory import Reading


class Gpu:
    """The first CUDA device.

    Args:
        cuda: `cuda.bindings.runtime`, or what a test puts in its place.

    Raises:
        InputError: there is no CUDA device, or its driver is too old.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.weights_bytes = self.allocated_bytes = 0
        """Of the engines that are open, and of buffers: now."""
        self._most = {"peak_bytes": 0, "weights_bytes": 0, "activations_bytes": 0}
        self._sizes: dict[int, int] = {}
        if not self.call("cudaGetDeviceCount"):
            raise InputError("CUDA: found no device, expected an NVIDIA GPU")
        self.call("cudaSetDevice", 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its value, if it has one.

        Raises:
            InputError: CUDA's error, on one line.
        """
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            _, text = self._cuda.cudaGetErrorString(error)
            raise InputError(f"CUDA: {name}: found {text.decode()} (error {int(error)}), expected it to work")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        """Device memory of at least one byte; its address."""
        try:
            pointer = int(self.call("cudaMalloc", max(size, 1)))
        except InputError as error:
            raise InputError(
                f"{error}; {size} bytes were asked for, {self.allocated_bytes} are in use: make a smaller image or "
                "batch, or load with low_memory"
            ) from None
        self._sizes[pointer] = size
        self._count(allocated=size)
        return pointer

    def free(self, pointer: int) -> None:
        """Give back what `allocate` gave."""
        self._count(allocated=-self._sizes.pop(pointer))
        self.call("cudaFree", pointer)

    def hold(self, size: int) -> None:
        """Count an engine that was opened, or with a negative size one that was closed."""
        self._count(weights=size)

    def _count(self, *, weights: int = 0, allocated: int = 0) -> None:
        self.weights_bytes += weights
        self.allocated_bytes += allocated
        now = self.weights_bytes + self.allocated_bytes, self.weights_bytes, self.allocated_bytes
        self._most = {row: max(most, n) for (row, most), n in zip(self._most.items(), now, strict=True)}

    def upload(self, pointer: int, array: NDArray[Any], stream: Any) -> None:
        """Copy a contiguous array to the device. The array must live until `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: NDArray[Any], pointer: int, stream: Any) -> None:
        """Copy from the device into a contiguous array, whose content is there after `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    def stream(self) -> Any:
        """A new stream, for `destroy_stream`."""
        return self.call("cudaStreamCreate")

    def synchronize(self, stream: Any) -> None:
        """Wait until all work on the stream is done; an error of that work comes out here."""
        self.call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self.call("cudaStreamDestroy", stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what `work` puts on the stream, without running it; a graph for `replay` and `destroy_graph`."""
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
        """Give a captured graph back."""
        self.call("cudaGraphExecDestroy", graph)

    def memory(self) -> dict[str, Reading]:
        """The rows of memory.SPLIT, of the GPU instead of the process; its overhead only where NVML tells."""
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


def with_overhead(rows: dict[str, Reading], peak: int, how: str, counted: int, own: str) -> dict[str, Reading]:
    """Add the peak and, where NVML tells, the runtime's own part, which is in the peak then.

    Args:
        rows: weights and activations on the GPU.
        peak: theirs, in bytes, and `how` it was found.
        counted: bytes that are theirs now.
        own: how the runtime's own part is found.
    """
    total = nvml_row()
    overhead: dict[str, Reading] = {}
    if total:
        beside = max(0, total["gpu_process_bytes"].bytes - counted)
        overhead["runtime_overhead_bytes"] = Reading(beside, own, "gpu")
        peak, how = peak + beside, f"{how}; and runtime overhead"
    else:
        how += "; without runtime overhead, which NVML does not tell here"
    return rows | overhead | total | {"peak_bytes": Reading(peak, how, "gpu")}


def nvml_row() -> dict[str, Reading]:
    """`gpu_process_bytes`, where NVML tells it."""
    total = nvml_process_bytes()
    if total is None:
        return {}
    return {"gpu_process_bytes": Reading(total, "this process on the GPU now, CUDA's own part included (NVML)", "gpu")}


def open_gpu(extra: str) -> Gpu:
    """The GPU of this machine.

    Args:
        extra: of edgeprune, which brings cuda-bindings.

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
    """What the driver says this process has on the first GPU; None without nvidia-ml-py or where it does not tell.

    Jetsons and Windows drivers do not tell; inside a container the process may have another number.
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
