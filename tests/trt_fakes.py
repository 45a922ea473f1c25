"""CUDA whose device is host memory, and a TensorRT that runs the ONNX export in ONNX Runtime, for tests without a GPU.

Buffers, copies and results are real. tests/runtimes/test_trt_runtime.py compares the names with the vendors' own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda_runtime
from numpy.typing import NDArray


class FakeCuda:
    """`cuda.bindings.runtime` whose device is host memory."""

    cudaMemcpyKind = cuda_runtime.cudaMemcpyKind
    cudaStreamCaptureMode = cuda_runtime.cudaStreamCaptureMode

    def __init__(self, *, memory: int = 10**9) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.memory, self.streams, self.uploads, self.launches = memory, 0, 0, 0
        self.recording: list[Callable[[], object]] | None = None
        self.streamable, self.values = 0, 1000
        """Bytes of every engine: of weights that it can stream, and of values at the profile's largest shapes."""
        self.largest_batch = 64
        """Of every engine's profile; every other axis is 1 to 64."""

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory"}[error]

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.memory - sum(b.nbytes for b in self.blocks.values()), self.memory

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if size > self.memory - sum(b.nbytes for b in self.blocks.values()):
            return 2, None
        block = np.empty(size, np.uint8)
        self.blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.blocks[pointer]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> tuple[int]:
        up = kind == cuda_runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert self.blocks[to if up else source].nbytes >= size
        self.uploads += up
        if self.recording is not None:
            self.recording.append(lambda: ctypes.memmove(to, source, size))
        else:
            ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams += 1
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[int]:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        recorded, self.recording = self.recording, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return 0, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        for work in graph:
            work()
        self.launches += 1
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        return (0,)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shapes, self.addresses, self.scratch = engine, {}, {}, 0
        self.fail = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.inputs:
            return self.shapes[name]
        zeros = {n: np.zeros(self.shapes[n], self.engine.get_tensor_dtype(n)) for n in self.engine.inputs}
        return self.engine.session.run([name], zeros)[0].shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.engine.cuda.blocks[address].nbytes >= size
        self.scratch = address

    def execute_async_v3(self, stream: int) -> bool:
        if self.fail:
            return False
        if self.engine.cuda.recording is not None:
            self.engine.cuda.recording.append(self.run)
        else:
            self.run()
        return True

    def run(self) -> None:
        blocks, inputs = self.engine.cuda.blocks, self.engine.inputs
        assert self.scratch in blocks
        feeds = {
            n: blocks[self.addresses[n]].view(self.engine.get_tensor_dtype(n)).reshape(self.shapes[n]) for n in inputs
        }
        for output, value in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feeds), strict=True):
            blocks[self.addresses[output.name]][: value.nbytes] = value.reshape(-1).view(np.uint8)


class FakeEngine:
    weight_streaming_budget_v2: int | None = None

    def __init__(self, cuda: FakeCuda, onnx_path: str) -> None:
        self.cuda, self.session = cuda, onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.tensors = {t.name: t for t in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.tensors)
        self.config: Any = None

    @property
    def streamable_weights_size(self) -> int:
        return self.cuda.streamable

    @property
    def device_memory_size_v2(self) -> int:
        return self.cuda.values

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        dims = self.tensors[name].shape
        limits = {"batch_size": self.cuda.largest_batch}
        largest = tuple(d if isinstance(d, int) else limits.get(d, 64) for d in dims)
        return [*(tuple(d if isinstance(d, int) else least for d in dims) for least in (1, 1)), largest]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, how: Any) -> FakeContext:
        self.config = how
        return FakeContext(self)


class FakeLogger:
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2


def fake_tensorrt(cuda: FakeCuda, **more: Any) -> Any:
    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, content: Any) -> FakeEngine | None:
            text = bytes(content).decode()
            if text.endswith(".onnx"):
                return FakeEngine(cuda, text)
            self.log.log(FakeLogger.WARNING, "never mind")
            self.log.log(FakeLogger.ERROR, "a header of\nversion 3")
            return None

    return SimpleNamespace(
        __name__="tensorrt", __version__="10.3", ILogger=FakeLogger, Runtime=Runtime, nptype=lambda dtype: dtype,
        TensorIOMode=SimpleNamespace(INPUT="input"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="managed"), **more,
    )  # fmt: skip
