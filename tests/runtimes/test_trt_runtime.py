"""The TensorRT runtime over a fake GPU (trt_fakes.py); a test compares the fakes' names with the vendors' own.

Needs tensorrt-rtx-cu12 and cuda-bindings. What is never executed here: reading an engine, and running it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
import torch
from cuda.bindings import runtime as cuda_runtime
from trt_fakes import FakeContext, FakeCuda, FakeEngine, fake_tensorrt

from edgeprune import runtimes
from edgeprune.bench import worker
from edgeprune.common.errors import InputError
from edgeprune.common.pieces import RESERVE
from edgeprune.experiments.hardware.checks import nvidia
from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import Failed
from edgeprune.export import folder, modules, to_onnx, to_trt
from edgeprune.runtimes import trt
from edgeprune.runtimes.gpu import Gpu, nvml_process_bytes

PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")


@pytest.fixture
def engines(tiny_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A TensorRT export made from an ONNX export: an engine is a file with the path of the ONNX file."""
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


@pytest.mark.parametrize(("options", "free"), [({}, 10**9), ({}, 0), ({"cuda_graph": True}, 10**9)])
def test_the_same_latents_as_onnx_runtime(
    engines: Path,
    tiny_folders: tuple[Path, Path],
    cuda: FakeCuda,
    options: dict[str, Any],
    free: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gpu, "room", lambda gpu: (0, free))
    with runtimes.load(tiny_folders[1]) as reference, runtimes.load(engines, **options) as ours:
        assert (ours.name, ours.backend.provider) == ("trt", "tensorrt" if free else "")
        for size in (64, 32):
            expected = reference.generate_latents("two red circles", seed=3, height=size)
            np.testing.assert_allclose(
                ours.generate_latents("two red circles", seed=3, height=size), expected, atol=1e-4
            )
        assert ours.generate("two red circles")[0].size == (64, 64)
        rows = ours.memory()
        assert rows["activations_bytes"].bytes > 1000 and "peak_rss_bytes" in rows
        sizes = {n: (engines / n / "model.engine").stat().st_size for n in PARTS}
        weights = sum(sizes.values()) if free else max(sizes.values())
        assert rows["weights_bytes"].bytes == weights and "counted" in rows["peak_bytes"].how
        # NVML reports nothing here, so the process's overhead is not included.
        assert "runtime_overhead_bytes" not in rows
        assert weights < rows["peak_bytes"].bytes <= weights + rows["activations_bytes"].bytes
        assert (cuda.launches > 0) == bool(options.get("cuda_graph"))
    assert not cuda.blocks and cuda.streams == 0
    with pytest.raises(InputError, match="closed"):
        ours.generate("x")


@pytest.mark.parametrize(
    ("quantized", "recorded", "said"),
    [(False, "float16", "fp16"), (False, "float32", "fp32"), (True, "float16", "W4A16"), (True, "float32", "W4A32")],
)
def test_precision_is_what_the_engine_computes_in(
    engines: Path, cuda: FakeCuda, quantized: bool, recorded: str, said: str
) -> None:
    record = json.loads((engines / folder.FILE).read_text())
    record |= {"quantized": quantized, "networks": {"transformer": {"precision": recorded}}}
    (engines / folder.FILE).write_text(json.dumps(record))
    with runtimes.load(engines) as model:
        assert model.backend.precision == said


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


def test_bench_sends_text_as_generate_does(engines: Path, cuda: FakeCuda) -> None:
    """Each step of the bench uploads latents and timestep alone; text goes to the device once."""
    spec = {"prompt": "two red circles", "warmup": 0, "settings": {"steps": None}}
    with runtimes.load(engines) as model:
        counts = []
        for repeats in (1, 4):
            before = cuda.uploads
            worker._steps(model, spec | {"repeats": repeats})
            counts.append(cuda.uploads - before)
    assert counts[1] - counts[0] == 3 * 2


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("free", [10**9, 0])
def test_engines_of_small_batches_draw_many_prompts(
    engines: Path,
    tiny_folders: tuple[Path, Path],
    cuda: FakeCuda,
    most: int,
    free: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["two red circles", "a star", "a ring"]
    cuda.largest_batch = most
    monkeypatch.setattr(Gpu, "room", lambda gpu: (0, free))
    with runtimes.load(engines) as model, runtimes.load(tiny_folders[1]) as whole:
        ours, theirs = (m.generate(prompts, seed=5, steps=2) for m in (model, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_weights_that_do_not_fit_are_streamed(
    engines: Path, tiny_folders: tuple[Path, Path], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a limit that the transformer's file exceeds by 20 bytes, and values leave room for 30 bytes of weights."""
    record = json.loads((engines / folder.FILE).read_text())
    record["networks"] = {"transformer": {"streams": True, "onnx_weight_bytes": 60}, "vae_decoder": {"streams": False}}
    (engines / folder.FILE).write_text(json.dumps(record))
    (engines / "transformer" / "code").write_bytes(bytes(9000))  # so that it is the largest network
    whole = sum(file.stat().st_size for file in (engines / "transformer").iterdir())
    size = (engines / "transformer" / "model.engine").stat().st_size
    cuda.streamable, cuda.values = 60, whole - size + 10
    with runtimes.load(tiny_folders[1]) as reference:
        expected = reference.generate_latents("two red circles", seed=3)
    for memory, budget, rows in ((whole - 20, 30, 2), (whole, None, 1)):
        with runtimes.load(engines, memory=RESERVE + memory) as ours:
            found = ours.generate_latents("two red circles", seed=3)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            network = ours.backend._networks["transformer"]  # type: ignore[attr-defined]
            assert network._engine.weight_streaming_budget_v2 == budget
            assert network._shapes["hidden_states"][0] == rows  # rows share the weights that are streamed
            assert ours.backend._engine.gpu.weights_bytes == size - (0 if budget is None else 60 - budget)  # type: ignore[attr-defined]
        assert not cuda.blocks
    with pytest.raises(InputError, match=r"memory: found 0\.20 GB, expected at least .* which transformer takes"):
        runtimes.load(engines, memory=RESERVE + whole - 61)


def test_the_check_for_a_gpu_sees_what_is_streamed(
    engines: Path, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "_engines", lambda place: (engines, fake_tensorrt(cuda)))
    monkeypatch.setattr("edgeprune.runtimes.gpu.open_gpu", lambda extra: Gpu(cuda))
    here = Place(torch.device("cpu"), tmp_path)
    with pytest.raises(Failed, match="of 0 bytes that can be streamed, None stayed"):
        nvidia.tensorrt_streams(here)
    cuda.streamable = 60
    said = nvidia.tensorrt_streams(here)
    assert re.fullmatch(r"60 of \d+ bytes streamed: differs by \S+ of the largest value", said) and cuda.launches == 1


def test_errors_are_one_line(engines: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtimes.load(engines) as model:
        with pytest.raises(
            InputError, match=r"hidden_states: found the shape \(2, 8, 65, 8\), expected .* \(64, 8, 64, 64\)"
        ):
            model.step(np.zeros((2, 8, 65, 8), np.float32), *model.backend.encode(["x", ""]), np.ones(2, np.float32))
        network = model.backend._networks["transformer"]  # type: ignore[attr-defined]
        network._context.fail = True
        with pytest.raises(
            InputError, match="transformer/model.engine: the engine failed: no reason given; inputs were"
        ):
            model.generate("x")
        network._context.fail = False
        cuda.memory = 100_000
        with pytest.raises(
            InputError,
            match=r"cannot allocate .* bytes of GPU memory: CUDA: cudaMalloc failed: out of memory \(error 2\)",
        ):
            model.generate("x", height=128, width=128)
        cuda.memory = 10**9
        model.generate("x")  # it still works
    (engines / "vae_decoder" / "model.engine").write_text("of another version")
    with pytest.raises(
        InputError,
        match=r"tensorrt 10.3 cannot read this engine: a header of version 3; .* built by tensorrt 10.3; exp",
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
    module = modules.VaeDecoder(AutoencoderKL.from_pretrained(tiny_folders[0] / "vae").float()).eval()
    engine = engines / "vae_decoder" / "model.engine"
    sizes = {"batch_size": (1, 1, 2), "latent_height": (4, 8, 8), "latent_width": (6, 8, 8)}
    source = to_onnx.NetworkSource("vae_decoder", module, {}, [], {})
    found = to_trt._engine_parity(source, engine, module, sizes, fake_tensorrt(cuda), half=True)
    assert found is not None and found["shapes"] == [{"latent_sample": [1, 8, 4, 6]}]
    assert found["rms_relative"] < 1e-4 and not cuda.blocks


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
