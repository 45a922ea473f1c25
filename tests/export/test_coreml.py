"""Core ML: the packages, parity by the reference evaluator (test_mil_reference.py), the runtime on a fake."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from coreml_fakes import ComputeUnit, FakeCoreML
from torch import nn

from edgeprune import runtimes, targets
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.writing import save_transformer
from edgeprune.common.errors import InputError, ParityError
from edgeprune.common.files import sha256_file, write_json
from edgeprune.export import coreml_chunks, coreml_packages, mil_conversion, modules, parity, sizes, to_coreml
from edgeprune.export.mil_reference import OPERATIONS, Package
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.quantization.quantize import prepare
from edgeprune.runtimes import coreml, memory, networks

import coremltools as ct  # isort: skip  # after to_coreml, which keeps it quiet
from edgeprune.artefact.loading import load_transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
MAC = dataclasses.replace(targets.load("macbook-m"), batch=(1, 2))
PHONE = dataclasses.replace(targets.load("iphone-15-pro"), chunks=2)


def fill(model: nn.Module) -> nn.Module:
    """Fill every PackedLinear with random integers over the whole range and scales of both signs."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            low = -(2 ** (layer.bits - 1))
            shape = layer.out_features, layer.in_features
            layer.weight_packed.copy_(pack(torch.randint(low, -low, shape, generator=generator), layer.bits))
            layer.weight_scale.copy_(torch.randn(layer.weight_scale.shape, generator=generator) * 0.2 / -low)
            if layer.bias is not None:
                layer.bias.copy_(torch.linspace(-1, 1, layer.out_features))
    return model


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artefact of two blocks with INT4 weights."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    pipeline = tiny.tiny_pipeline(folder, num_layers=2)
    config, family = read_config(folder)
    model = fill(prepare(family, pipeline.transformer))
    state = {n: t if n.endswith(("_packed", "_scale")) else t.half() for n, t in model.state_dict().items()}
    save_transformer(folder, "transformer_int4", config, state)
    manifest = Manifest(source="tiny", fingerprint="", family="sd3", config=config, group_size=64)
    manifest.hash_files(folder, "transformer_int4")
    manifest.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(artefact: Path) -> Any:
    return load_transformer(artefact, quantized=True)


@pytest.fixture(scope="module")
def exported(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "coreml"
    return out, to_coreml.export(artefact, out, device=MAC)


# ------------------------------------------------------------------------------------- the packages


@pytest.mark.slow  # test_integers.py reads the same package
def test_every_quantised_layer_feeds_a_linear(exported: tuple[Path, dict[str, Any]], model: nn.Module) -> None:
    """test_integers.py checks that the integers are the checkpoint's."""
    operations = Package(exported[0] / "transformer" / "model.mlpackage").operations
    found = [op for op in operations if op.type == "constexpr_blockwise_shift_scale"]
    assert len(found) == sum(isinstance(m, PackedLinear) for m in model.modules()) == 32
    made = {op.outputs[0].name for op in found}
    readers = [op for op in operations for a in op.inputs.values() for b in a.arguments if b.name in made]
    assert [op.type for op in readers] == ["linear"] * 32


def test_folder_and_parity(exported: tuple[Path, dict[str, Any]]) -> None:
    out, record = exported
    assert json.loads((out / "edgeprune_export.json").read_text()) == record
    assert (record["target"], record["device"], record["chunks"]) == ("coreml", "macbook-m", {"transformer": 1})
    assert set(record["parity"]) == {"transformer", "text_encoder", "text_encoder_2", "vae_decoder"}
    for name, found in record["parity"].items():
        assert 0 < found["max_relative"] < 1e-3 and found["max_relative"] < found["half_relative"] < 1e-2, name
        assert (out / name / "model.mlpackage").is_dir() and (out / name / "config.json").is_file()
    assert json.loads((out / "generation.json").read_text()) == tiny.GENERATION | {"solver": "euler"}
    batches = [shapes["timestep"] for shapes in record["parity"]["transformer"]["shapes"]]
    assert batches == [[1], [2]]


def test_what_a_program_asks_for(exported: tuple[Path, dict[str, Any]]) -> None:
    package = Package(exported[0] / "transformer" / "model.mlpackage")
    types = Counter(op.type for op in package.operations)
    assert types["scaled_dot_product_attention"] == 2 and "matmul" not in types and "softmax" not in types
    assert package.spec.specificationVersion == ct.target.iOS18
    kinds = {o.name: (op.type, o.type.tensorType.dataType) for op in package.operations for o in op.outputs}
    half, full = ct.proto.MIL_pb2.FLOAT16, ct.proto.MIL_pb2.FLOAT32
    assert {kind for op, kind in kinds.values() if op in ("sin", "cos")} == {full}
    assert {kind for op, kind in kinds.values() if op in ("linear", "layer_norm", "scaled_dot_product_attention")} == {
        half
    }
    inputs = {v.name: coreml.shapes(v.type.multiArrayType)[0] for v in package.spec.description.input}
    assert inputs["hidden_states"] == [(1, 8, 8, 8), (2, 8, 8, 8)]
    assert inputs["encoder_hidden_states"] == [(1, 16, 64), (2, 16, 64)]
    # Only the part of the position table (16 x 16) that the size needs is stored.
    stored = [o.type.tensorType.dimensions for op in package.operations if op.type == "const" for o in op.outputs]
    assert [1, 256, 64] not in [[d.constant.size for d in dims] for dims in stored]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_package_that_ran_is_not_mapped(
    exported: tuple[Path, dict[str, Any]], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a chain of packages would end with all weights in memory."""
    path, seen, linear = exported[0] / "transformer" / "model.mlpackage", list[bool](), OPERATIONS["linear"]

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    def watched(**given: torch.Tensor) -> Any:
        seen.append(is_mapped())
        return linear(**given)

    monkeypatch.setitem(OPERATIONS, "linear", watched)
    example = modules.Transformer(model).example(batch=1, height=8, width=8, tokens=16)
    Package(path).run(None, {name: value.numpy() for name, value in example.items()})
    assert all(seen) and seen and not is_mapped()


@pytest.fixture(scope="module")
def chunked(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer in two chunks, for batches of 1 and 2, by a run that was interrupted twice."""
    folder = tmp_path_factory.mktemp("chunks")
    whole, converted = modules.Transformer(model), list[list[str]]()
    examples = [whole.example(batch=b, height=8, width=8, tokens=16) for b in (1, 2)]
    parts, real = coreml_chunks.split(whole, PHONE.chunks, examples[0]), coreml_packages.convert

    def run(last: tuple[str, int, int] | None) -> dict[str, Any]:
        def told(*event: Any) -> None:
            if event == last:
                raise KeyboardInterrupt

        return coreml_packages.convert_network(
            "transformer", parts, whole, examples, folder, chunks=len(parts), progress=told
        )

    kept = dict[str, str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreml_packages, "convert", lambda *a, **k: converted.append(a[2]) or real(*a, **k))
        for last in (("transformer: converted", 1, 2), ("transformer: compared", 3, 8)):
            with pytest.raises(KeyboardInterrupt):
                run(last)
            found = {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
            assert kept.items() < found.items()
            kept = found
        assert run(None)["max_relative"] < 1e-3
    assert converted == [["image_tokens_1", "text_tokens_1", "modulation"], ["out_hidden_states"]]
    assert kept == {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
    return folder


def test_a_large_transformer_has_more_chunks_than_its_device_asks_for(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(name: str, parts: Any, reference: Any, examples: Any, path: Path, **_: Any) -> dict[str, Any]:
        (path / "model.mlpackage").touch()
        return {"parts": len(list(parts))}

    monkeypatch.setattr(to_coreml, "convert_network", network)
    size = sum(p.stat().st_size for p in (artefact / "transformer_int4").glob("*.safetensors"))
    monkeypatch.setattr(to_coreml, "CHUNK_BYTES", size - 1)
    record = to_coreml.export(artefact, tmp_path / "out", device=MAC)
    assert MAC.chunks == 1 and record["chunks"] == {"transformer": 2}
    assert record["parity"]["transformer"]["parts"] == 2


@pytest.mark.slow  # test_coreml_text.py has chunks of a T5
def test_chunks_equal_the_whole(exported: tuple[Path, dict[str, Any]], chunked: Path, model: Any) -> None:
    paths = sorted(chunked.iterdir())
    assert [p.name for p in paths] == ["chunk_1.mlpackage", "chunk_2.mlpackage"]
    packages = [Package(path) for path in paths]
    assert packages[1].inputs == ["image_tokens_1", "text_tokens_1", "modulation"]
    example = modules.Transformer(model).example(batch=1, height=8, width=8, tokens=16, seed=3)
    feeds = {name: value.numpy() for name, value in example.items()}
    names = ["out_hidden_states"]
    whole = Package(exported[0] / "transformer" / "model.mlpackage").run(names, feeds)[0]
    assert parity.relative_error(coreml_packages.Chain(paths).run(names, feeds)[0], whole)[0] < 1e-5
    counts = [sum(op.type == "constexpr_blockwise_shift_scale" for op in x.operations) for x in packages]
    assert counts == [14 + 5, 11 + 2]  # a block, then embedders or output layers


def test_parts_equal_the_model_with_patches_of_two() -> None:
    model = tiny.tiny_transformer(patch_size=2, num_layers=3)
    whole = modules.Transformer(model)
    example = whole.example(batch=2, height=3, width=5, tokens=4)
    tensors = dict(example)
    parts = coreml_chunks.split(whole, 7, example)
    assert len(parts) == 3
    with torch.no_grad():
        for part in parts:
            tensors |= zip(part.outputs, part(*(tensors[name] for name in part.inputs)), strict=True)
        torch.testing.assert_close(tensors["out_hidden_states"], whole.reference(**example)[0])


class Layer(nn.Module):
    """One quantised layer of odd width; `large` adds an intermediate value that overflows half precision."""

    inputs, outputs = ["x"], ["y"]

    def __init__(self, bits: int, bias: bool, large: bool = False) -> None:
        super().__init__()
        self.layer, self.large = fill(PackedLinear(48, 7, bits=bits, group_size=16, bias=bias)), large

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = self.layer(x)
        return ((y * 500) ** 2 / 4096,) if self.large else (y,)


def compared(module: Layer, folder: Path) -> dict[str, Any]:
    example = {"x": torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))}
    return coreml_packages.convert_network("layer", [module], module, [example], folder)


@pytest.mark.parametrize(("bits", "bias"), [(4, True), (8, False)])
def test_one_layer(bits: int, bias: bool, tmp_path: Path) -> None:
    assert compared(Layer(bits, bias), tmp_path)["max_relative"] < 5e-4
    types = Counter(op.type for op in Package(tmp_path / "model.mlpackage").operations)
    assert types["linear"] == types["constexpr_blockwise_shift_scale"] == 1


def test_wrong_order_of_nibbles_fails_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mil_conversion.unpack
    monkeypatch.setattr(mil_conversion, "unpack", lambda packed, bits: right(packed >> 4 | packed << 4, bits))
    with pytest.raises(ParityError, match="layer: y: found a relative error of"):
        compared(Layer(4, True), tmp_path)


def test_overflow_in_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="layer: its activations overflow"):
        compared(Layer(4, True, large=True), tmp_path)


# ------------------------------------------------------------------------------------- refused before any work


@pytest.mark.parametrize("requires", ["iOS 17", "macOS 14.5", "iPadOS 17", "compute capability 8.0"])
def test_too_old_a_system(requires: str, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"requires: found '{requires}', expected macOS 15, iOS 18"):
        to_coreml.export(artefact, tmp_path / "out", device=dataclasses.replace(MAC, requires=requires))
    assert not list(tmp_path.iterdir())


def test_size_is_held_to_the_device(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))

    def sized(height: int, width: int, most: int) -> tuple[int, int]:
        write_json(copy / "generation.json", tiny.GENERATION | {"height": height, "width": width})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = sizes.generation_for(copy, dataclasses.replace(MAC, side=(8, most)))
        assert bool(told) == ((height, width) != (found.height, found.width))
        return found.height, found.width

    assert sized(64, 96, 512) == (64, 96)
    assert sized(64, 96, 77) == (64, 72)
    assert sized(1024, 512, 512) == (128, 128)  # 16 patches of the position table
    with pytest.raises(InputError, match=r"generation\.json: height: found 60, expected a multiple of 8"):
        sized(60, 64, 512)


# ------------------------------------------------------------------------------------- the runtime, with a fake Core ML


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> FakeCoreML:
    fake = FakeCoreML()
    monkeypatch.setattr(coreml, "coremltools", fake)
    return fake


def test_draws_what_torch_draws(exported: tuple[Path, dict[str, Any]], artefact: Path, vendor: FakeCoreML) -> None:
    prompts = ["two red circles", "a star above a ring"]
    with runtimes.load(exported[0], compute_units="cpu_and_ne") as ours, runtimes.load(artefact) as theirs:
        assert (ours.name, ours.backend.provider, ours.backend.precision) == ("coreml", "cpu_and_ne", "W4A16")
        assert set(ours.backend.times) == {"text_encoder", "text_encoder_2", "transformer", "vae_decoder"}  # type: ignore[attr-defined]
        assert all(t.keys() == {"compile_s", "specialise_s"} for t in ours.backend.times.values())  # type: ignore[attr-defined]
        images = [m.generate(prompts, seed=7, steps=2) for m in (ours, theirs)]
    assert {units for _, units in vendor.loaded} == {ComputeUnit.CPU_AND_NE}
    # Two prompts and an empty one, one by one; guidance's batch of 4 as 2 and 2; two images one by one.
    assert vendor.batches == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1]
    for a, b in zip(*images, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2
    assert np.asarray(images[0][0]).std() > 5
    with pytest.raises(InputError, match="closed"):
        ours.generate("x")


def test_networks_that_take_turns_compile_once(
    exported: tuple[Path, dict[str, Any]], vendor: FakeCoreML, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "allowed", lambda: 0)
    with runtimes.load(exported[0]) as model:
        assert not vendor.loaded
        for _ in range(2):
            model.generate("x", steps=1, guidance_scale=0)
    assert len(vendor.compiled) == 4 and len(vendor.loaded) == 8


@pytest.mark.slow
def test_chunks_are_chained_all_open_or_in_turn(
    exported: tuple[Path, dict[str, Any]],
    chunked: Path,
    model: Any,
    vendor: FakeCoreML,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "copy"))
    shutil.rmtree(folder / "transformer" / "model.mlpackage")
    shutil.copytree(chunked, folder / "transformer", dirs_exist_ok=True)
    example = modules.Transformer(model).example(batch=2, height=8, width=8, tokens=16, seed=3)
    latents, text, pooled, timestep = (value.numpy() for value in example.values())
    with runtimes.load(folder) as runtime:
        assert len(vendor.alive) == 5
        found = runtime.step(latents, text, pooled, timestep / 1000)
    assert vendor.batches == [2, 2]
    with torch.no_grad():
        assert parity.relative_error(found, model(**example, return_dict=False)[0].numpy())[0] < 1e-3

    described, opened = coreml.described, list[int]()
    sizes = {"model": 90 * 10**6, "chunk_1": 60 * 10**6, "chunk_2": 50 * 10**6}
    monkeypatch.setattr(coreml, "described", lambda path: dataclasses.replace(described(path), size=sizes[path.stem]))
    monkeypatch.setattr(coreml, "room_here", lambda: (0, 10**12))
    monkeypatch.setattr(coreml, "resident", lambda: 0)
    monkeypatch.setattr(
        vendor, "batches", SimpleNamespace(append=lambda rows: opened.extend([rows, len(vendor.alive)]))
    )
    with pytest.raises(InputError, match=r"^memory: found 0.28 GB, expected at least 0.31 GB, which vae_decoder takes"):
        runtimes.load(folder, memory=280_000_000)
    with runtimes.load(folder, memory=300_000_000) as runtime:
        assert runtime.backend.largest_batch() is None and not vendor.alive
        in_turn = runtime.step(latents, text, pooled, timestep / 1000)
        assert not vendor.alive
    assert opened == [1, 1] * 4  # both rows, one by one, through one chunk after the other
    np.testing.assert_allclose(in_turn, found, atol=1e-5)


def test_errors_name_the_folder(exported: tuple[Path, dict[str, Any]], vendor: FakeCoreML, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compute_units: found 'gpu', expected one of all, cpu_and_ne"):
        runtimes.load(exported[0], compute_units="gpu")
    with runtimes.load(exported[0]) as model:
        with pytest.raises(InputError, match="height: found 32, expected 64, which this export was made for"):
            model.generate("x", height=32, width=96)
        text, pooled = model.backend.encode(["x"])
        with pytest.raises(InputError, match=r"transformer: hidden_states: found shape \(1, 8, 4, 12\)"):
            model.step(np.zeros((1, 8, 4, 12), np.float32), text, pooled, np.ones(1, np.float32))
        network = model.backend._networks["vae_decoder"]  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="vae_decoder: inputs: the package also needs"):
            network(latents=np.zeros((1, 8, 8, 8)))
        (opened,) = network._kept.values()
        opened.predict = lambda _: (_ for _ in ()).throw(RuntimeError("no\nmemory"))
        with pytest.raises(InputError, match=r"vae_decoder: Core ML failed: no memory; inputs were .*\(1, 8, 8, 8\)"):
            network(latent_sample=np.zeros((1, 8, 8, 8)))
    folder = Path(shutil.copytree(exported[0], tmp_path / "damaged"))
    unusable = r"text_encoder/model\.mlpackage: Core ML cannot open it: "
    with pytest.raises(InputError, match=rf"{unusable}compiler error: no such operation; export again$"):
        runtimes.load(folder)
    (folder / "text_encoder" / "model.mlpackage" / "Manifest.json").unlink()
    with pytest.raises(InputError, match=rf"{unusable}A valid manifest does not exist"):
        runtimes.load(folder)
    shutil.rmtree(folder / "text_encoder" / "model.mlpackage")
    with pytest.raises(InputError, match=r"text_encoder/model\.mlpackage: neither it nor chunk_1"):
        runtimes.load(folder)


def test_elsewhere_than_on_a_mac(exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "coremltools", None)
    with pytest.raises(InputError, match=r"expected macOS 15 or newer: Core ML runs on Apple devices only"):
        runtimes.load(exported[0])


def test_physical_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, path: str) -> None:
            assert "libSystem" in path

        def proc_pid_rusage(self, pid: int, flavour: int, buffer: Any) -> int:
            assert flavour == 4
            struct.pack_into("<16x35Q", buffer, 0, *range(100, 135))
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    rows = memory._footprint()
    assert {name: row.bytes for name, row in rows.items()} == {"footprint_bytes": 107, "peak_footprint_bytes": 128}
    assert rows.keys() <= set(memory.ROWS)
    monkeypatch.setattr(Library, "proc_pid_rusage", lambda *_: -1)
    assert memory._footprint() == {}
