"""TensorRT export: real engines built here without a GPU, their layers and shapes. The runtime: test_trt_runtime.py.

Needs tensorrt-rtx-cu12 and cuda-bindings. What is never executed here: reading an engine, and running it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx
import tiny
import torch
from cuda.bindings import runtime as cuda_runtime
from torch import nn
from trt_fakes import FakeCuda

from edgeprune import runtimes, targets
from edgeprune.common.errors import EdgepruneError, InputError, MissingExtraError
from edgeprune.export import APART, engine, external_data, folder, forms, graph, parity, to_onnx, to_trt
from edgeprune.families import family_of
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.runtimes import trt
from edgeprune.runtimes.base import Settings
from edgeprune.runtimes.gpu import Gpu
from edgeprune.runtimes.modulation import AT_ONCE, ROWS, WIDTH
from edgeprune.sampling.generation import Generation

RTX = targets.load("rtx")
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")


def packed(layer: nn.Linear, bits: int, group_size: int, generator: torch.Generator) -> PackedLinear:
    """Return a layer with random integers over the whole range and random scales."""
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
    """A tiny pipeline's engines, the reported progress, the record, and the ONNX files that TensorRT got."""
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
        assert said["streams"] is True  # a graphics card has memory of its own
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


@pytest.mark.slow  # two more engines; test_modulation_apart.py runs the same files in ONNX Runtime
def test_the_modulation_has_an_engine_of_its_own(
    built: SimpleNamespace, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are an input of the transformer's; both are compared with the float32 checkpoint."""
    given, real, sources = dict[str, Any](), to_trt.Builder.build, to_onnx.sources

    def build(self: to_trt.Builder, name: str, path: Path, *rest: Any) -> dict[str, Any]:
        given[name] = onnx.load(str(path)).graph.input
        return real(self, name, path, *rest)

    def two(artefact: Path, has: Any, **how: Any) -> Any:
        return sources(artefact, lambda name: name not in (ROWS, "transformer"), **how)

    monkeypatch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
    monkeypatch.setattr(to_onnx, "sources", two)
    monkeypatch.setattr(to_trt.Builder, "build", build)
    record = to_trt.export(built.source, tmp_path / "engines", device=RTX, modulation=APART)
    kinds = {name: {i.name: i.type.tensor_type.elem_type for i in inputs} for name, inputs in given.items()}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert kinds[ROWS] == {"pooled_projections": half, "timestep": single}
    assert kinds["transformer"] == dict.fromkeys(("hidden_states", "encoder_hidden_states", ROWS), half)
    for name in (ROWS, "transformer"):
        assert record["networks"][name]["precision"] == "float16"
        assert 0 < record["parity"][name]["rms_relative"] < parity.HALF_BOUND
    layers = (record["networks"][name]["int4_layers"] for name in (ROWS, "transformer"))
    assert sum(layers) == built.record["networks"]["transformer"]["int4_layers"]
    most = RTX.batch[1]
    assert record["networks"]["transformer"]["profile"][ROWS][2] == [most, record[WIDTH]]
    assert [shape[0] for shape in record["networks"][ROWS]["profile"]["timestep"]] == [1, AT_ONCE, AT_ONCE]


def test_timesteps_stay_float32(built: SimpleNamespace) -> None:
    kinds = {i.name: i.type.tensor_type.elem_type for i in built.given["transformer"].graph.input}
    assert kinds.pop("timestep") == onnx.TensorProto.FLOAT and set(kinds.values()) == {onnx.TensorProto.FLOAT16}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_that_tensorrt_maps_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT maps the data file next to the ONNX file; its pages are evicted while it builds."""
    layer, x = nn.Linear(1024, 1024), torch.ones(1, 1024)
    external_data.save(graph.to_ir(layer, {"input": x}, {"input": {}}, {"y": {}}), tmp_path / "model.onnx")
    given: list[tuple[bool, bool]] = []
    real = engine.mapped.evicting

    def watched(path: Path) -> contextlib.AbstractContextManager[None]:
        given.append((path.is_file(), str(path) in Path("/proc/self/maps").read_text()))
        return real(path)

    monkeypatch.setattr(engine.mapped, "evicting", watched)
    shape = (1, 1024)
    spec = engine.Spec(
        "tensorrt_rtx", "layer", str(tmp_path / "model.onnx"), str(tmp_path / "model.engine"),
        {"input": (shape, shape, shape)}, str(tmp_path / "timing.cache"), streams=False,
    )  # fmt: skip
    engine.build(spec, lambda *_: None)
    assert given == [(True, True)] and (tmp_path / "model.engine").stat().st_size > 2**20


def test_a_wrong_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None, streams=False)
    with pytest.raises(EdgepruneError, match="vae: tensorrt_rtx cannot read its ONNX: "):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")


def test_a_build_that_is_killed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may kill the build for lack of memory; the export's own process survives."""
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delattr(signal, "SIGKILL")  # as on Windows
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None, streams=False)
    with pytest.raises(EdgepruneError, match=r"vae: tensorrt_rtx ended with -9 .*takes too much memory"):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")
    (tmp_path / "python").write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    with pytest.raises(EdgepruneError, match=r"vae: tensorrt_rtx ended with 3 .*: no such library$"):
        builder.build("vae", tmp_path / "model.onnx", {}, tmp_path / "engine")


def test_an_overflow_is_seen_and_means_float32() -> None:
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return ((x * 300) * 300 / 90_000,)

    def source(x: torch.Tensor) -> to_onnx.NetworkSource:
        return to_onnx.NetworkSource("large", Large(), {"x": x}, [{"x": x}], {"x": x})  # type: ignore[arg-type]

    small = source(torch.rand(2, 4) / 2)
    good, error, references = to_trt._half_precision(small, RTX)
    assert good and error is not None and 0 < error < parity.HALF_BOUND
    torch.testing.assert_close(references, [list(Large()(small.examples[0]["x"].half().float()))])
    assert to_trt._half_precision(source(torch.rand(2, 4) + 1), RTX) == (False, None, [])
    single = dataclasses.replace(RTX, activations="float32")
    assert to_trt._half_precision(source(torch.rand(2, 4)), single) == (False, None, [])


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


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_int4_stays_packed_in_the_engine(streams: bool, tmp_path: Path) -> None:
    layer = packed(nn.Linear(1024, 1024), 4, 64, torch.Generator().manual_seed(1))
    x, axes = torch.randn(2, 1024).half(), {0: "b"}
    external_data.save(graph.to_ir(One(layer).half(), {"x": x}, {"x": axes}, {"y": axes}), tmp_path / "model.onnx")
    profile = {"x": ((1, 1024), (2, 1024), (4, 1024))}
    builder = to_trt.Builder(tensorrt_rtx, b"", lambda *_: None, streams=streams)
    said = builder.build("one", tmp_path / "model.onnx", profile, tmp_path / "engine")
    assert said == {"int4_layers": 1, "int8_layers": 0}
    # Its weights are 0.5 MB in INT4, 2.1 MB in half precision; the rest is code.
    assert 524_288 < (tmp_path / "engine").stat().st_size < 1_048_576


def test_forms_change_no_value(tmp_path: Path) -> None:
    layer = packed(nn.Linear(128, 7), 8, 128, torch.Generator().manual_seed(1))
    axes = {0: "b", 1: "m"}
    built = graph.to_ir(One(layer), {"x": torch.randn(3, 5, 128)}, {"x": axes}, {"y": axes})
    forms.per_output(built)
    external_data.save(built, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    scales = [ir.load(tmp_path / "model.onnx").graph.initializers["weight_scale.T"].const_value.numpy()]
    assert scales[0].ndim == 1
    found = parity.check(
        "y", parity.session(tmp_path / "model.onnx"), One(layer), [{"x": torch.randn(2, 9, 128)}], ["y"]
    )
    assert found["max_relative"] < 1e-5


def test_real_vendors_without_a_gpu(built: SimpleNamespace, tmp_path: Path) -> None:
    """Test what the vendors do here: TensorRT rejects a file, and CUDA a machine without a driver."""
    (tmp_path / "model.engine").write_bytes(b"no engine")
    with pytest.raises(InputError, match=r"model.engine: tensorrt_rtx .* cannot read this engine: "):
        trt.TrtNetwork(tmp_path / "model.engine", tensorrt_rtx, Gpu(FakeCuda()))
    if int(cuda_runtime.cudaGetDeviceCount()[0]):
        with pytest.raises(InputError, match="CUDA: cudaGetDeviceCount failed: "):
            runtimes.load(built.out)
