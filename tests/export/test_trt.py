"""TensorRT: real engines built here without a GPU, their layers and shapes; the runtime over a fake GPU.

The fake CUDA is host memory and the fake TensorRT runs the ONNX export in ONNX Runtime, so buffers, copies and results
are real; a test holds the fakes' names against the vendors' own. Needs tensorrt-rtx-cu12 and cuda-bindings. What is
never executed here: reading an engine, and running it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tensorrt_rtx
import tiny
import torch
from cuda.bindings import runtime as cuda_runtime
from numpy.typing import NDArray
from torch import nn

from edgeprune import runtimes, targets
from edgeprune.common.errors import EdgepruneError, InputError, MissingExtraError
from edgeprune.export import engine, folder, forms, graph, parity, to_onnx, to_trt
from edgeprune.families import family_of
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.runtimes import trt
from edgeprune.runtimes.base import Settings
from edgeprune.runtimes.gpu import Gpu, nvml_process_bytes
from edgeprune.sampling.generation import Generation

RTX = targets.load("rtx")
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")


def packed(layer: nn.Linear, bits: int, group_size: int, generator: torch.Generator) -> PackedLinear:
    """Random integers over the whole range, random scales."""
    low, shape = -(2 ** (bits - 1)), (layer.out_features, layer.in_features)
    out = PackedLinear(shape[1], shape[0], bits=bits, group_size=group_size, bias=layer.bias is not None)
    out.weight_packed.copy_(pack(torch.randint(low, -low, shape, generator=generator), bits))
    scale = torch.randn(out.weight_scale.shape, generator=generator) * 0.2 / -low
    out.weight_scale.copy_(scale.abs() + 1e-4)
    if layer.bias is not None:
        out.bias.copy_(layer.bias.detach())
    return out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One block whose layers are INT4 in groups of 64, and layers outside it INT8 with one scale per output."""
    whole = tiny.tiny_transformer(num_layers=1)
    generator = torch.Generator().manual_seed(5)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, nn.Linear):
            inside = name.startswith("transformer_blocks")
            parent, _, leaf = name.rpartition(".")
            kind = (4, 64) if inside else (8, layer.in_features)
            setattr(whole.get_submodule(parent), leaf, packed(layer, *kind, generator))
    return whole


@pytest.fixture(scope="module")
def built(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny pipeline's engines, what was told and written, and the transformer's ONNX that TensorRT was given."""
    source = tmp_path_factory.mktemp("trt") / "tiny"
    tiny.tiny_pipeline(source, num_layers=1)
    (source / "transformer_int4").mkdir()
    shutil.copyfile(source / "transformer" / "config.json", source / "transformer_int4" / "config.json")
    out, given, events = source.with_name("engines"), {}, list[Any]()
    real = to_trt.Builder.build

    def build(self: to_trt.Builder, name: str, path: Path, *rest: Any) -> dict[str, Any]:
        given[name] = onnx.load(str(path))
        return real(self, name, path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
        patch.setattr(to_trt.Builder, "build", build)
        record = to_trt.export(source, out, device=RTX, progress=lambda *event: events.append(event))
    told = [what for what, *numbers in events if not numbers]
    steps = [event for event in events if len(event) == 3]
    return SimpleNamespace(source=source, out=out, record=record, told=told, steps=steps, given=given)


# ------------------------------------------------------------------------------------- engines, built here


def test_engines(built: SimpleNamespace) -> None:
    record = built.record
    assert record == json.loads((built.out / folder.FILE).read_text())
    assert (record["target"], record["device"], record["quantized"]) == ("trt", "rtx", True)
    assert record["builder"] == {"name": "tensorrt_rtx", "version": tensorrt_rtx.__version__}
    assert [line for line in built.told if ":" not in line] == list(PARTS)
    ours = ("transformer: compared", "transformer: tried in half precision")
    steps = [tuple(n) for what, *n in built.steps if what.startswith("transformer: ") and what not in ours]
    assert len(set(steps)) > 2 and any(done == total for done, total in steps)  # TensorRT's own phases
    for name in PARTS:
        said = record["networks"][name]
        engine = built.out / name / "model.engine"
        assert engine.stat().st_size == said["engine_bytes"] > 1000 and said["precision"] == "float16"
        assert 0 < record["parity"][name]["rms_relative"] < parity.HALF_BOUND
        assert said["engine_parity"] is None or said["engine_parity"]["bound"] == parity.HALF_BOUND
    assert not list(built.out.rglob("*.onnx*")) and not list(built.out.rglob("tmp*"))
    assert (built.out / "tokenizer" / "tokenizer.json").is_file()


def test_layers_are_packed_in_what_tensorrt_parsed(built: SimpleNamespace, model: nn.Module) -> None:
    bits = Counter(layer.bits for layer in model.modules() if isinstance(layer, PackedLinear))
    said = built.record["networks"]["transformer"]
    assert (said["int4_layers"], said["int8_layers"]) == (bits[4], bits[8])
    as_half = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    stored = sum(m.weight_packed.numel() for m in model.modules() if isinstance(m, PackedLinear))
    assert said["onnx_weight_bytes"] < as_half and stored < as_half / 3


def test_timesteps_stay_float32(built: SimpleNamespace) -> None:
    kinds = {i.name: i.type.tensor_type.elem_type for i in built.given["transformer"].graph.input}
    assert kinds.pop("timestep") == onnx.TensorProto.FLOAT and set(kinds.values()) == {onnx.TensorProto.FLOAT16}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_that_tensorrt_maps_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file beside the ONNX file is what it maps, and what is given back while it builds."""
    layer, x = nn.Linear(1024, 1024), torch.ones(1, 1024)
    graph.save(graph.to_ir(layer, {"input": x}, {"input": {}}, {"y": {}}), tmp_path / "model.onnx")
    given: list[tuple[bool, bool]] = []
    real = engine.mapped.evicting

    def watched(path: Path) -> contextlib.AbstractContextManager[None]:
        given.append((path.is_file(), str(path) in Path("/proc/self/maps").read_text()))
        return real(path)

    monkeypatch.setattr(engine.mapped, "evicting", watched)
    shape = (1, 1024)
    spec = engine.Spec(
        "tensorrt_rtx", "layer", str(tmp_path / "model.onnx"), str(tmp_path / "model.engine"),
        {"input": (shape, shape, shape)}, str(tmp_path / "timing.cache"),
    )  # fmt: skip
    engine.build(spec, lambda *_: None)
    assert given == [(True, True)] and (tmp_path / "model.engine").stat().st_size > 2**20


def test_a_wrong_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None)
    with pytest.raises(EdgepruneError, match="vae: tensorrt_rtx cannot read its ONNX: "):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")


def test_a_build_that_is_killed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the system, for want of memory; the export's own process goes on."""
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None)
    with pytest.raises(EdgepruneError, match=r"vae: tensorrt_rtx ended with -9 .*takes too much memory"):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")
    (tmp_path / "python").write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    with pytest.raises(EdgepruneError, match=r"vae: tensorrt_rtx ended with 3 .*: no such library$"):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")


def test_an_overflow_is_seen_and_means_float32() -> None:
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return ((x * 300) * 300 / 90_000,)

    def part(x: torch.Tensor) -> to_onnx.Part:
        return to_onnx.Part("large", Large(), {"x": x}, [{"x": x}])  # type: ignore[arg-type]

    small = part(torch.rand(2, 4) / 2)
    good, error, known = to_trt._half_precision(small, RTX)
    assert good and error is not None and 0 < error < parity.HALF_BOUND
    torch.testing.assert_close(known, [list(Large()(small.examples[0]["x"].half().float()))])
    assert to_trt._half_precision(part(torch.rand(2, 4) + 1), RTX) == (False, None, [])
    single = dataclasses.replace(RTX, activations="float32")
    assert to_trt._half_precision(part(torch.rand(2, 4)), single) == (False, None, [])


# ------------------------------------------------------------------------------------- shapes


def settings(side: int, *, factor: int = 8, patch: int = 2) -> Settings:
    config = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "patch_size": patch, "pos_embed_max_size": 192}
    return Settings(Generation(4, 3.0, side, side, 0), factor, family_of(config), config)


@pytest.mark.parametrize(
    ("device", "side", "patch", "table", "expected"),
    [
        ("rtx", 1024, 2, 192, (64, 128, 128)),  # SD3.5 on 512 to 1024 pixels
        ("cuda-server", 1024, 2, 192, (32, 128, 256)),
        ("rtx", 64, 1, 16, (8, 8, 16)),  # the built-in model: its own size, up to its position table
        ("jetson-orin-nano-8gb", 1440, 2, 192, (32, 128, 128)),
        ("rtx", 512, 2, 40, (64, 64, 80)),  # a table of 640 pixels
    ],
)
def test_ranges(device: str, side: int, patch: int, table: int, expected: tuple[int, int, int]) -> None:
    target = targets.load(device)
    sizes = to_trt.axis_ranges(target, settings(side, patch=patch), table, 333)
    assert sizes["height"] == sizes["latent_width"] == expected
    assert sizes["batch_size"] == (target.batch[0], 2, target.batch[1]) and sizes["sequence_length"] == (1, 333, 333)


def test_profile(built: SimpleNamespace) -> None:
    profile = built.record["networks"]["transformer"]["profile"]
    assert profile["hidden_states"] == [[1, 8, 8, 8], [2, 8, 8, 8], [2, 8, 16, 16]]
    assert profile["encoder_hidden_states"] == [[1, 1, 64], [2, 16, 64], [2, 16, 64]]
    assert profile["timestep"] == [[1], [2], [2]]
    assert built.record["networks"]["vae_decoder"]["profile"]["latent_sample"][2] == [2, 8, 16, 16]
    assert built.record["networks"]["text_encoder"]["profile"]["input_ids"] == [[1, 1], [2, 16], [2, 16]]


# ------------------------------------------------------------------------------------- refused before any work


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jetson = targets.load("jetson-orin-16gb")
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed; run: pip install 'edgeprune\[trt\]'"):
        to_trt.export(tmp_path / "nothing", tmp_path / "out", device=jetson)  # tensorrt_rtx does not build for it
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"tensorrt_rtx is not installed; .*\[trt-rtx\]"):
        to_trt.export(tmp_path / "nothing", tmp_path / "out", device=RTX)


# ------------------------------------------------------------------------------------- forms


class One(nn.Module):
    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.model = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(x),)


def test_int4_stays_packed_in_the_engine(tmp_path: Path) -> None:
    layer = packed(nn.Linear(1024, 1024), 4, 64, torch.Generator().manual_seed(1))
    x, axes = torch.randn(2, 1024).half(), {0: "b"}
    graph.save(graph.to_ir(One(layer).half(), {"x": x}, {"x": axes}, {"y": axes}), tmp_path / "model.onnx")
    profile = {"x": ((1, 1024), (2, 1024), (4, 1024))}
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None)
    said = builder.build("one", tmp_path / "model.onnx", profile, tmp_path / "engine")
    assert said == {"int4_layers": 1, "int8_layers": 0}
    # Its weights are 0.5 MB in INT4, 2.1 MB in half precision; the rest is code.
    assert 524_288 < (tmp_path / "engine").stat().st_size < 1_048_576


def test_forms_change_no_value(tmp_path: Path) -> None:
    layer = packed(nn.Linear(128, 7), 8, 128, torch.Generator().manual_seed(1))
    axes = {0: "b", 1: "m"}
    built = graph.to_ir(One(layer), {"x": torch.randn(3, 5, 128)}, {"x": axes}, {"y": axes})
    forms.per_output(built)
    graph.save(built, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    scales = [ir.load(tmp_path / "model.onnx").graph.initializers["weight_scale.T"].const_value.numpy()]
    assert scales[0].ndim == 1
    found = parity.check(
        "y", parity.session(tmp_path / "model.onnx"), One(layer), [{"x": torch.randn(2, 9, 128)}], ["y"]
    )
    assert found["max_relative"] < 1e-5


# ------------------------------------------------------------------------------------- the runtime on a fake GPU


class FakeCuda:
    """`cuda.bindings.runtime` whose device is host memory."""

    cudaMemcpyKind = cuda_runtime.cudaMemcpyKind
    cudaStreamCaptureMode = cuda_runtime.cudaStreamCaptureMode

    def __init__(self, *, memory: int = 10**9) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.memory, self.streams, self.uploads, self.launches = memory, 0, 0, 0
        self.recording: list[Callable[[], None]] | None = None

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory"}[error]

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
    def __init__(self, cuda: FakeCuda, onnx_path: str) -> None:
        self.cuda, self.session = cuda, onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.tensors = {t.name: t for t in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.tensors)
        self.config: Any = None

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        dims = self.tensors[name].shape
        return [tuple(d if isinstance(d, int) else limit for d in dims) for limit in (1, 2, 64)]

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


@pytest.fixture
def engines(tiny_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """An ONNX export made into a TensorRT one: an engine is a file with the ONNX file's path."""
    out = tmp_path / "engines"
    shutil.copytree(tiny_folders[1], out, ignore=shutil.ignore_patterns("*.onnx*"))
    for name in PARTS:
        (out / name / "model.engine").write_text(str(tiny_folders[1] / name / "model.onnx"))
    record = json.loads((out / folder.FILE).read_text())
    builder = {"name": "tensorrt", "version": "10.3"}
    (out / folder.FILE).write_text(json.dumps(record | {"target": "trt", "builder": builder}))
    return out


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(trt, "vendor", lambda name: fake_tensorrt(fake))
    monkeypatch.setattr(trt, "open_gpu", lambda extra: Gpu(fake))
    return fake


def test_the_fakes_have_the_vendors_names() -> None:
    def own(fake: type) -> set[str]:
        return {n for n in vars(fake) if not n.startswith("_")}

    assert {n for n in own(FakeCuda) if not hasattr(cuda_runtime, n)} == set()
    assert own(FakeContext) - {"run"} <= set(dir(tensorrt_rtx.IExecutionContext))
    assert own(FakeEngine) | {"num_io_tensors"} <= set(dir(tensorrt_rtx.ICudaEngine))
    names = {*vars(fake_tensorrt(FakeCuda())), "CudaGraphStrategy"}
    assert names <= set(dir(tensorrt_rtx)) | {"__name__", "__version__"}
    assert hasattr(tensorrt_rtx.IRuntimeConfig, "cuda_graph_strategy")
    assert tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE and tensorrt_rtx.ILogger.INTERNAL_ERROR


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"cuda_graph": True}])
def test_the_same_latents_as_onnx_runtime(
    engines: Path, tiny_folders: tuple[Path, Path], cuda: FakeCuda, options: dict[str, Any]
) -> None:
    with runtimes.load(tiny_folders[1]) as reference, runtimes.load(engines, **options) as ours:
        assert (ours.name, ours.backend.provider) == ("trt", "" if options.get("low_memory") else "tensorrt")
        for size in (64, 32):
            expected = reference.generate_latents("two red circles", seed=3, height=size)
            np.testing.assert_allclose(
                ours.generate_latents("two red circles", seed=3, height=size), expected, atol=1e-4
            )
        assert ours.generate("two red circles")[0].size == (64, 64)
        rows = ours.memory()
        assert rows["activations_bytes"].bytes > 1000 and "peak_rss_bytes" in rows
        sizes = {n: (engines / n / "model.engine").stat().st_size for n in PARTS}
        largest = max(sizes["transformer"], sizes["text_encoder"] + sizes["text_encoder_2"], sizes["vae_decoder"])
        weights = largest if options.get("low_memory") else sum(sizes.values())
        assert rows["weights_bytes"].bytes == weights and "counted" in rows["peak_bytes"].how
        # NVML does not tell here: the process's overhead is not mixed in.
        assert "runtime_overhead_bytes" not in rows
        assert weights < rows["peak_bytes"].bytes <= weights + rows["activations_bytes"].bytes
        assert (cuda.launches > 0) == bool(options.get("cuda_graph"))
    assert not cuda.blocks and cuda.streams == 0
    with pytest.raises(InputError, match="closed"):
        ours.generate("x")


def test_text_goes_to_the_device_once(engines: Path, cuda: FakeCuda) -> None:
    with runtimes.load(engines) as model:
        text, pooled = model.backend.encode(["two red circles"])
        before = cuda.uploads
        allocated = []
        model.generate_latents(
            "two red circles", guidance_scale=1, steps=5, progress=lambda *_: allocated.append(list(cuda.blocks))
        )
        # Token ids of two encoders; latents and timestep of five steps; text and pooled text once.
        assert cuda.uploads - before == 2 + 5 * 2 + 2
        assert all(a == allocated[0] for a in allocated)  # buffers stay where they are
        latents, sigma = np.zeros((1, 8, 8, 8), np.float32), np.ones(1, np.float32)
        first = model.step(latents, text, pooled, sigma)
        text *= 2  # writeable: it may change between calls
        assert np.abs(model.step(latents, text, pooled, sigma) - first).max() > 0


def test_errors_are_one_line(engines: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtimes.load(engines) as model:
        with pytest.raises(
            InputError, match=r"hidden_states: found the shape \(2, 8, 65, 8\), expected .* \(64, 8, 64, 64\)"
        ):
            model.generate("x", height=520)
        network = model.backend._networks["transformer"]  # type: ignore[attr-defined]
        network._context.fail = True
        with pytest.raises(InputError, match="transformer/model.engine: the engine failed: no reason given; inputs were"):
            model.generate("x")
        network._context.fail = False
        cuda.memory = 100_000
        with pytest.raises(InputError, match=r"cannot allocate .* bytes of GPU memory: CUDA: cudaMalloc failed: out of memory \(error 2\)"):
            model.generate("x", height=128, width=128)
        cuda.memory = 10**9
        model.generate("x")  # it goes on
    (engines / "vae_decoder" / "model.engine").write_text("of another version")
    with pytest.raises(
        InputError, match=r"tensorrt 10.3 cannot read this engine: a header of version 3; .* built by tensorrt 10.3; exp"
    ):
        runtimes.load(engines)
    (engines / "vae_decoder" / "model.engine").write_text("")
    with pytest.raises(InputError, match="no such file or an empty one, expected a TensorRT engine"):
        runtimes.load(engines)
    record = json.loads((engines / folder.FILE).read_text())
    (engines / folder.FILE).write_text(json.dumps(record | {"builder": {"name": "nvcc"}}))
    with pytest.raises(InputError, match="builder: found .*nvcc.*, expected the name tensorrt or tensorrt_rtx"):
        runtimes.load(engines)


def test_rtx_captures_by_itself(engines: Path, cuda: FakeCuda) -> None:
    strategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    vendor = fake_tensorrt(cuda, CudaGraphStrategy=strategy)
    network = trt.TrtNetwork(engines / "vae_decoder" / "model.engine", vendor, Gpu(cuda), cuda_graph=True)
    assert network._engine.config.cuda_graph_strategy == "whole"
    network(latent_sample=np.zeros((1, 8, 4, 4)))
    assert cuda.launches == 0
    network.close()
    network.close()


def test_the_engine_is_compared_where_there_is_a_gpu(
    engines: Path, tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    cuda = FakeCuda()
    monkeypatch.setattr(to_trt, "open_gpu", lambda extra: Gpu(cuda))
    module = graph.VaeDecoder(AutoencoderKL.from_pretrained(tiny_folders[0] / "vae").float()).eval()
    engine = engines / "vae_decoder" / "model.engine"
    sizes = {"batch_size": (1, 1, 2), "latent_height": (4, 8, 8), "latent_width": (6, 8, 8)}
    found = to_trt._engine_parity("vae_decoder", engine, module, sizes, fake_tensorrt(cuda), half=True)
    assert found is not None and found["shapes"] == [{"latent_sample": [1, 8, 4, 6]}]
    assert found["rms_relative"] < 1e-4 and not cuda.blocks


def test_real_vendors_without_a_gpu(built: SimpleNamespace, tmp_path: Path) -> None:
    """As far as the vendors go: TensorRT's refusal of a file, and CUDA's of a machine without a driver."""
    (tmp_path / "model.engine").write_bytes(b"no engine")
    with pytest.raises(InputError, match=r"model.engine: tensorrt_rtx .* cannot read this engine: "):
        trt.TrtNetwork(tmp_path / "model.engine", tensorrt_rtx, Gpu(FakeCuda()))
    if int(cuda_runtime.cudaGetDeviceCount()[0]):
        with pytest.raises(InputError, match="CUDA: cudaGetDeviceCount failed: "):
            runtimes.load(built.out)


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_process_bytes() is None
    import os

    fake = SimpleNamespace(
        NVMLError=OSError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetComputeRunningProcesses=lambda h: [
            SimpleNamespace(pid=1, usedGpuMemory=1), SimpleNamespace(pid=os.getpid(), usedGpuMemory=5_000),
        ],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml_process_bytes() == 5_000
    assert Gpu(FakeCuda()).memory()["gpu_process_bytes"].bytes == 5_000

    def fails() -> None:
        raise OSError("driver not loaded")

    fake.nvmlInit = fails
    assert nvml_process_bytes() is None
