"""OpenVINO: packed integers, exact halves, torch's images, devices that are not here, and errors that name the file.

Executed on the CPU. GPU and NPU are a fake core that compiles their models for the CPU. Options:
test_openvino_runtime.py.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from torch import nn

from edgeprune import export, runtimes, targets
from edgeprune.bench import disk
from edgeprune.common import pieces
from edgeprune.common.errors import EdgepruneError, InputError, MissingExtraError
from edgeprune.common.files import sha256_file
from edgeprune.export import external_data, folder, genai, graph, modules, parity, to_openvino
from edgeprune.families.sd3 import SD3
from edgeprune.quantization.precision import Precision
from edgeprune.quantization.quantize import packed_from, round_to_nearest
from edgeprune.runtimes import memory, networks

openvino = pytest.importorskip("openvino")
from openvino_fakes import EXACT, FakeCore  # noqa: E402

from edgeprune.runtimes import openvino as runtime  # noqa: E402
from edgeprune.runtimes import openvino_graph, piecewise, precision  # noqa: E402

ROOT = Path(__file__).parents[2]
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")
PROMPTS = ["two red circles", "a drawing of a star above a ring"]


def opened(path: Path, device: str, config: dict[str, Any]) -> runtime.OpenVinoNetwork:
    return runtime.OpenVinoNetwork(runtime.OpenVinoFile(path, device, config))


@pytest.fixture(scope="module")
def exported(tiny_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tiny pipeline as IR. It reuses the ONNX of `tiny_folders`, because tracing takes long."""
    source, traced = tiny_folders
    out, names, told = tmp_path_factory.mktemp("out") / "ir", iter(NETWORKS), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "to_ir", lambda *_, **__: ir.load(traced / next(names) / "model.onnx"))
        record = export.export(
            source,
            out,
            "openvino",
            targets.load("intel-igpu"),
            modulation=export.INSIDE,
            progress=lambda what, *steps: steps or told.append(what),
        )
    assert told == list(NETWORKS)
    return out, record


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny transformer in INT4 with groups of 32 and INT8 modulation."""
    out = tiny.tiny_transformer(num_layers=2)
    for name, layer in list(out.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks"):
            precision = Precision(8, layer.in_features) if "norm1" in name else Precision(4, 32)
            parent, _, leaf = name.rpartition(".")
            packed = packed_from(layer, *round_to_nearest(layer.weight.detach(), precision), precision)
            setattr(out.get_submodule(parent), leaf, packed)
    return out


@pytest.fixture(scope="module")
def quantised(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's IR. test_integers.py checks that the integers are the checkpoint's."""
    wrapper = modules.Transformer(model)
    path = tmp_path_factory.mktemp("quantised") / "transformer" / "model.onnx"
    path.parent.mkdir()
    traced = wrapper.example(batch=2, height=4, width=6, tokens=5)
    external_data.save(graph.to_ir(wrapper, traced, wrapper.inputs, wrapper.outputs), path)
    runner = to_openvino.converted(path)
    examples = [wrapper.example(batch=b, height=h, width=w, tokens=16) for b, h, w in ((1, 8, 8), (3, 5, 7))]
    assert parity.check("transformer", runner, wrapper, examples, list(wrapper.outputs))["max_relative"] < 1e-5
    assert sorted(p.name for p in path.parent.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    return path.with_name("openvino_model.xml")


# ------------------------------------------------------------------------------------- the file


def test_unpacked_integers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = openvino.save_model

    def careless(model: Any, path: Path, **options: Any) -> None:
        real(model, path, **options)
        weights = path.with_suffix(".bin")
        weights.write_bytes(weights.read_bytes() * 8)

    monkeypatch.setattr(openvino, "save_model", careless)
    with pytest.raises(EdgepruneError, match=r"found \d+ bytes of weights.*unpacked the integers"):
        to_openvino.converted(one_layer(tmp_path))


def test_mapped_weights_are_given_back_while_they_are_repacked(
    quantised: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repacking happens when it compiles and at the first run."""
    given: list[tuple[Path, bool]] = []

    @contextmanager
    def spy(path: Path, *, kept: bool = False) -> Iterator[None]:
        given.append((path, kept))
        yield

    monkeypatch.setattr(runtime, "evicting", spy)
    network = opened(quantised, "CPU", EXACT)
    example = modules.Transformer(model).example(batch=1, height=4, width=4, tokens=3)
    for _ in range(2):
        network(**{name: value.numpy() for name, value in example.items()})
    assert given == [(quantised.with_suffix(".bin"), True)] * 2


def test_only_exact_constants_are_halved() -> None:
    from openvino import opset13 as ops

    exact = np.arange(512, dtype=np.float32) / 8
    x = ops.parameter([512], np.float32)
    values = {"exact": exact, "tenth": exact + np.float32(0.1), "huge": exact + np.float32(2**17)}
    total: Any = x
    for name, value in values.items():
        constant = ops.constant(value)
        constant.set_friendly_name(name)
        total = ops.add(total, constant)
    built = openvino.Model([total], [x])
    to_openvino.halve(built)
    kinds = sorted(n.get_element_type().get_type_name() for n in built.get_ops() if n.get_type_name() == "Constant")
    assert kinds == ["f16", "f32", "f32"]
    (found,) = openvino.compile_model(built, "CPU", EXACT)([np.zeros(512, np.float32)]).values()
    np.testing.assert_array_equal(found, (values["exact"] + values["tenth"]) + values["huge"])


def test_folder(exported: tuple[Path, dict[str, Any]], tiny_folders: tuple[Path, Path]) -> None:
    out, record = exported
    assert json.loads((out / folder.FILE).read_text()) == record
    assert (record["target"], record["quantized"], record["openvino"]) == ("openvino", False, openvino.get_version())
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {folder.FILE}
    assert {f: sha256_file(out / f) for f in files} == record["files"]
    models = {f for f in files if f.endswith((".xml", ".bin", ".onnx", ".data"))}
    tokenizers = {f"{name}/openvino_tokenizer.{end}" for name in ("tokenizer", "tokenizer_2") for end in ("xml", "bin")}
    assert models == {f"{name}/openvino_model.{end}" for name in NETWORKS for end in ("xml", "bin")} | tokenizers
    assert [said.keys() for said in record["tokenizers"].values()] == [{"different"}] * 2
    assert record["openvino_tokenizers"].startswith(version("openvino-tokenizers"))
    for name in NETWORKS:
        assert 0 < record["parity"][name]["max_relative"] < 2e-5, name
        onnx_bytes = sum(p.stat().st_size for p in (tiny_folders[1] / name).glob("model.onnx*"))
        assert (out / name / "openvino_model.bin").stat().st_size < 0.6 * onnx_bytes  # stored in half precision
    assert [p.name for p in out.parent.iterdir()] == ["ir"]
    assert disk.disk_bytes(out)["transformer_disk_bytes"] == sum(
        (out / f).stat().st_size for f in models if f.startswith("transformer/")
    )


@pytest.mark.parametrize("package", ["openvino", "openvino_tokenizers"])
def test_export_without_a_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = package.replace("_", "-")
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed; run: pip install 'edgeprune\[openvino\]'"):
        to_openvino.export(tmp_path / "x", tmp_path / "y", device=targets.load("cpu-x86"))


def test_killed_while_it_writes_tokenizers(
    exported: tuple[Path, dict[str, Any]],
    tiny_folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No network is made again, and the bytes are those of an export that was not interrupted."""
    source, traced = tiny_folders
    names, told, real = iter(NETWORKS), list[str](), genai.ir_tokenizer.write
    monkeypatch.setattr(graph, "to_ir", lambda *_, **__: ir.load(traced / next(names) / "model.onnx"))

    def killed(folder: Path, length: int) -> dict[str, Any]:
        done = real(folder, length)
        if folder.name == "tokenizer_2":
            raise KeyboardInterrupt
        return done

    def export() -> dict[str, Any]:
        return to_openvino.export(
            source,
            tmp_path / "ir",
            device=targets.load("intel-igpu"),
            progress=lambda what, *steps: steps or told.append(what),
        )

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(genai.ir_tokenizer, "write", killed)
        export()
    assert told == list(NETWORKS) and not (tmp_path / "ir").exists()
    told.clear()
    record = export()
    assert told == [] and record["files"] == exported[1]["files"]
    assert {f: sha256_file(tmp_path / "ir" / f) for f in record["files"]} == record["files"]


def test_a_device_needs_no_openvino_tokenizers(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with runtimes.load(exported[0], "openvino", threads=1) as ours:
        assert ours.generate(PROMPTS[0], seed=3, steps=1)[0].size == (64, 64)


def test_a_file_that_openvino_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "vae_decoder").mkdir()
    path = tmp_path / "vae_decoder" / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(EdgepruneError, match="vae_decoder: OpenVINO cannot convert it") as caught:
        to_openvino.converted(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- the runtime


@pytest.mark.filterwarnings("ignore")
def test_same_seed_same_image_as_torch(
    exported: tuple[Path, dict[str, Any]], tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same float32 weights, latents agree to 1e-4 of their size and pixels to 1 of 255, from IR and ONNX."""
    source, onnx_folder = tiny_folders
    with runtimes.load(source) as theirs:
        reference = theirs.generate_latents(PROMPTS, seed=7)
        images = [np.asarray(image, int) for image in theirs.generate(PROMPTS, seed=7)]
    for path, free in ((exported[0], 10**12), (exported[0], 0), (onnx_folder, 10**12), (onnx_folder, 0)):
        monkeypatch.setattr(networks, "allowed", lambda free=free: free)
        with runtimes.load(path, threads=1) as ours:
            assert (ours.name, ours.backend.provider) == ("openvino", "CPU" if free else "")
            found = ours.generate_latents(PROMPTS, seed=7)
            assert np.linalg.norm(found - reference) <= 1e-4 * np.linalg.norm(reference)
            for a, b in zip(ours.generate(PROMPTS, seed=7), images, strict=True):
                assert np.abs(np.asarray(a, int) - b).max() <= 1
        with pytest.raises(InputError, match="closed"):
            ours.generate("x")
        ours.close()
    assert images[0].std() > 5


@pytest.mark.slow  # test_piecewise.py draws from the ONNX files in little memory
def test_little_memory_gives_the_same_image(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 30 kB, where every block is opened and closed at each step, and the VAE runs in strips."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 30_000)
    monkeypatch.setattr(piecewise, "TABLE", 0)
    looked_up = list[int]()
    look_up = piecewise.Lookup.__call__
    monkeypatch.setattr(piecewise.Lookup, "__call__", lambda self, feed: looked_up.append(1) or look_up(self, feed))
    latents, images, held = [], [], []
    for free in (10**12, 0):
        monkeypatch.setattr(networks, "allowed", lambda free=free: free)
        with runtimes.load(exported[0], threads=1) as ours:
            latents.append(ours.generate_latents(PROMPTS[0], seed=3, steps=1))
            network = ours.backend._networks["transformer"]  # type: ignore[attr-defined]
            ran = len(getattr(network, "_pieces", ()))
            assert ran == 0 if free else ran > 5
            images.append(ours.backend.decode(latents[-1]))
            held.append(list(ours.backend._networks))  # type: ignore[attr-defined]
    assert held == [["text_encoder", "text_encoder_2", *NETWORKS[::3]], ["vae_decoder"]]
    assert len(looked_up) >= 4  # two encoders, two prompts
    assert np.abs(latents[0] - latents[1]).max() <= 1e-5 * np.abs(latents[0]).max()
    assert np.abs(images[0] - images[1]).max() <= 1e-3


def test_an_onnx_folder_is_opened_by_openvino_first(
    tiny_folders: tuple[Path, Path], exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtimes.candidates(tiny_folders[1]) == ["openvino", "ort"]
    assert runtimes.candidates(exported[0]) == ["openvino"]
    assert runtimes.choose(tiny_folders[1]) == "openvino"
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else real(name))
    assert runtimes.choose(tiny_folders[1]) == "ort"
    with pytest.raises(MissingExtraError, match=r"openvino is not installed; run: pip install 'edgeprune\[openvino\]'"):
        runtimes.load(exported[0])


@pytest.mark.parametrize("name", ["transformer", "text_encoder_2", "vae_decoder"])
def test_damaged_files(exported: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    source = exported[0] / name
    for damage in ("truncate xml", "truncate bin", "no bin", "no xml"):
        copy = Path(shutil.copytree(source, tmp_path / damage))
        kind, end = damage.split()
        path = copy / f"openvino_model.{end}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if kind == "no":
            path.unlink()
        with pytest.raises(
            InputError, match=r"openvino_model\.xml: (OpenVINO cannot open it on|no such file).*export again$"
        ) as caught:
            opened(copy / "openvino_model.xml", "CPU", EXACT)
        assert "\n" not in str(caught.value)


def test_wrong_inputs_are_named(exported: tuple[Path, dict[str, Any]]) -> None:
    network = opened(exported[0] / "vae_decoder" / runtime.FILES["openvino"], "CPU", EXACT)
    with pytest.raises(InputError, match=r"xml: inputs: the model also needs \['latent_sample'\], found \['x'\]"):
        network(x=np.zeros(1))
    with pytest.raises(InputError, match=r"xml: OpenVINO failed: .*inputs were \{'latent_sample': \[1, 3, 4, 4\]\}"):
        network(latent_sample=np.zeros((1, 3, 4, 4)))


def test_dynamic_quantisation_rounds_activations(quantised: Path, model: nn.Module) -> None:
    example = modules.Transformer(model).example(batch=2, height=8, width=8, tokens=16)
    with torch.no_grad():
        expected = model(**example, return_dict=False)[0].numpy()
    errors = []
    for name in ("exact", "int8"):
        config = runtime.settings_of("CPU", precision=name, threads=1)
        found = opened(quantised, "CPU", config)(**example)
        errors.append(parity.relative_error(found["out_hidden_states"], expected)[0])
    assert errors[0] < 1e-5 and errors[1] < 5e-2
    # On a CPU without int8 kernels OpenVINO does not round activations.
    assert errors[1] >= errors[0] / 2


def test_bf16_leaves_angles_alone(
    quantised: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near 1000, neighbouring bf16 numbers are four radians apart."""
    wrapper = modules.Transformer(model)
    example = wrapper.example(batch=2, height=8, width=8, tokens=16) | {"timestep": torch.tensor([501.0, 997.3])}
    with torch.no_grad():
        expected = model(**example, return_dict=False)[0].numpy()
    tree = ElementTree.parse(quantised)
    marked = [
        layer for layer in tree.iterfind("layers/layer") if layer.find("rt_info/attribute[@name='precise']") is not None
    ]
    assert {"Parameter", "Sin", "Cos", "Reshape"} <= {str(layer.get("type")) for layer in marked}
    assert {layer.get("name") for layer in marked if layer.get("type") == "Parameter"} == {"timestep"}
    for layer in marked:
        layer.remove(layer.find("rt_info"))  # type: ignore[arg-type]
    tree.write(tmp_path / quantised.name)
    (tmp_path / "openvino_model.bin").symlink_to(quantised.with_suffix(".bin"))
    config = runtime.settings_of("CPU", precision="bf16", threads=1)
    errors = []
    for path in (quantised, tmp_path / quantised.name):
        found = opened(path, "CPU", config)(**example)
        errors.append(parity.relative_error(found["out_hidden_states"], expected)[1])
    assert errors[0] < 2e-2
    if runtime._heeds_marks() and not precision.lacking("bf16"):  # without instructions for it, float32 is computed
        assert errors[1] > 3 * errors[0]
    monkeypatch.setattr(openvino, "__version__", "2026.3.1-22001-abc")
    assert not runtime._heeds_marks()
    found = opened(quantised, "CPU", config)(**example)  # in float32, as there was no other way
    assert parity.relative_error(found["out_hidden_states"], expected)[1] < 1e-4


def test_a_signal_finds_its_stack_after_many_models(quantised: Path) -> None:
    """With one core per model, destroyed in order of creation, this is a segmentation fault."""
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from edgeprune.runtimes import openvino as runtime
        path, config = Path({str(quantised)!r}), runtime.settings_of("CPU", threads=1)
        first, second = (runtime.OpenVinoNetwork(runtime.OpenVinoFile(path, "CPU", config)) for _ in "ab")
        first.close()
        second.close()
        signal.signal(signal.SIGTERM, lambda *_: print("asked to stop"))
        os.kill(os.getpid(), signal.SIGTERM)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "asked to stop\n"), done.stderr


def test_compile_cache(quantised: Path, model: nn.Module, tmp_path: Path) -> None:
    arrays = {k: v.numpy() for k, v in modules.Transformer(model).example(batch=1, height=4, width=4, tokens=3).items()}
    config = runtime.settings_of("CPU", threads=1, cache_dir=tmp_path / "cache")
    found = []
    for _ in range(2):
        network = opened(quantised, "CPU", config)
        found.append(network(**arrays)["out_hidden_states"])
        assert len(list((tmp_path / "cache").glob("*.blob"))) == 1
    np.testing.assert_array_equal(*found)


# ------------------------------------------------------------------------------------- devices that are not here


@pytest.mark.parametrize("device", ["NPU", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GPU.1", "CPU"))])
def test_sizes_are_fixed(device: str, exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is compiled for the sizes of its call; the transformer again when the batch changes."""
    monkeypatch.setattr(runtime, "core", FakeCore)
    monkeypatch.setattr(FakeCore, "compiled", [])
    with runtimes.load(exported[0], "openvino", device=device) as ours:
        assert not FakeCore.compiled
        drawn = ours.generate_latents(PROMPTS[0], seed=3, steps=2)
        without = ours.generate_latents(PROMPTS[0], seed=3, steps=1, guidance_scale=1.0)
        ours.backend.decode(drawn)
        assert ours.backend.provider == device
    assert len(FakeCore.compiled) == 1 + 1 + 2 + 1
    assert {(d, static) for d, static, _ in FakeCore.compiled} == {(device, True)}
    monkeypatch.undo()
    with runtimes.load(exported[0], "openvino", threads=1) as ours:
        np.testing.assert_allclose(drawn, ours.generate_latents(PROMPTS[0], seed=3, steps=2), atol=1e-4)
        again = ours.generate_latents(PROMPTS[0], seed=3, steps=1, guidance_scale=1.0)
        np.testing.assert_allclose(without, again, atol=1e-4)


def test_a_family_that_overflows_half_precision_is_not_computed_in_it(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "core", FakeCore)
    monkeypatch.setattr(FakeCore, "compiled", [])
    monkeypatch.setattr(SD3, "overflows", True)
    with runtimes.load(exported[0], "openvino", device="GPU.1") as ours:
        ours.generate_latents(PROMPTS[0], seed=3, steps=1)
        assert ours.backend.precision == "fp32"
    *others, transformer = (config.get("INFERENCE_PRECISION_HINT") for _, _, config in FakeCore.compiled)
    assert transformer == "f32" and set(others) == {None}
    with pytest.raises(InputError, match=r"^device: found NPU, .*: values of sd3 models exceed float16$"):
        runtimes.load(exported[0], "openvino", device="NPU")


def test_only_the_transformer_is_rounded(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(exported[0], tmp_path / "out"))
    record = exported[1] | {
        "precisions": {"openvino": {"int8-bf16": 0.014, "int8": 0.013, "bf16": 0.004}},
        "group_size": 64,
    }
    (out / folder.FILE).write_text(json.dumps(record))
    monkeypatch.setattr(runtime, "core", FakeCore)
    monkeypatch.setattr(precision, "instructions", lambda: frozenset({"avx_vnni"}))
    for options, group, said in (
        ({}, "64", "int8, off by 0.013"),
        ({"precision": "exact"}, "0", "precision=exact"),
    ):
        monkeypatch.setattr(FakeCore, "compiled", [])
        with runtimes.load(out, "openvino", **options) as ours:
            ours.generate_latents(PROMPTS[0], seed=3, steps=1)
            assert ours.backend.why == f"device=CPU; {said}"
        groups = [config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] for _, _, config in FakeCore.compiled]
        assert groups == ["0", "0", group]  # two text encoders come first


def test_an_export_that_marks_no_angles_says_what_it_computes_in(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one: OpenVINO opens its transformer in float32, though it was measured in bf16."""
    out = Path(shutil.copytree(exported[0], tmp_path / "out"))
    measured = {"precisions": {"openvino": {"int8": 0.03, "bf16": 0.004}}, "group_size": 64}
    (out / folder.FILE).write_text(json.dumps(exported[1] | measured))
    monkeypatch.setattr(precision, "instructions", lambda: frozenset({"avx512_bf16", "avx512_vnni"}))
    found = []
    path = out / "transformer" / "openvino_model.xml"
    for text in (path.read_text(), path.read_text().replace("<angles", "<others")):
        path.write_text(text)
        with runtimes.load(out, "openvino", threads=1) as ours:
            found.append((ours.backend.precision, ours.backend.why.rpartition(";")[2].split(",")[0].strip()))
    assert found == [("bf16", "bf16"), ("fp32", "exact")]
    with pytest.raises(InputError, match=r"^precision: found 'bf16', but .* does not mark the angles.*export again$"):
        runtimes.load(out, "openvino", threads=1, precision="bf16")


# ------------------------------------------------------------------------------------- processes


def one_layer(path: Path) -> Path:
    """Write an ONNX file with one INT4 layer."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear(512, 512)
            self.model = packed_from(linear, *round_to_nearest(linear.weight.detach(), p), p)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x),)

    p = Precision(4, 64)
    out = path / "layer" / "model.onnx"
    out.parent.mkdir()
    built = graph.to_ir(Wrapper(), {"x": torch.randn(2, 3, 512)}, {"x": {0: "b", 1: "m"}}, {"y": {0: "b", 1: "m"}})
    external_data.save(built, out)
    return out


@pytest.mark.slow  # test_memory.py loads whole folders as often
@pytest.mark.skipif(sys.platform != "linux", reason="the memory rows are Linux's")
def test_nothing_leaks(tmp_path: Path) -> None:
    """Open, use and close 100 times: the last 70 add less than 2 MB; one float copy of the layer has 1 MB."""
    path = one_layer(tmp_path)
    to_openvino.converted(path)
    path, x = path.with_name(to_openvino.MODEL), np.ones((2, 3, 512), np.float32)
    held = []
    for i in range(100):
        network = opened(path, "CPU", EXACT)
        network(x=x)
        network.close()
        if i in (29, 99):
            gc.collect()
            held.append(memory.read()["anon_bytes"].bytes)
    assert held[1] - held[0] < 2_000_000, held


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("axis", "width", "fused"), [(-1, 8, True), (3, 8, True), (2, 8, False), (-1, 512, False)])
def test_attention_is_one_operation_where_it_is_one(axis: int, width: int, fused: bool) -> None:
    from openvino import opset13 as ops

    def built() -> Any:
        q, k, v = (ops.parameter([1, 2, 6, width], np.float32, name=name) for name in "qkv")
        scores = ops.matmul(q, ops.transpose(k, np.array([0, 1, 3, 2])), False, False)
        return openvino.Model([ops.result(ops.matmul(ops.softmax(scores, axis), v, False, False))], [q, k, v])

    feed = [np.random.default_rng(i).standard_normal((1, 2, 6, width), dtype=np.float32) for i in range(3)]
    (expected,) = openvino.compile_model(built(), "CPU", EXACT)(feed).values()
    changed = built()
    openvino_graph.fuse_attention(changed)
    assert any(op.get_type_name() == "ScaledDotProductAttention" for op in changed.get_ops()) == fused
    (found,) = openvino.compile_model(changed, "CPU", EXACT)(feed).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
