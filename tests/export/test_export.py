"""ONNX export: a whole folder, its arithmetic at other sizes than the traced ones, failures. Layers: test_graph.py."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest
import tiny
import torch
import traced
from quantised import two_blocks
from tokenizers import Tokenizer
from torch import nn

from edgeprune.common.errors import DiskError, InputError, ParityError
from edgeprune.common.files import sha256_file
from edgeprune.export import chunked_onnx, folder, graph, modules, parity, to_onnx, unfinished

ROOT = Path(__file__).parents[2]
onnxruntime = pytest.importorskip("onnxruntime")
LAYERS = 25  # 14 in a block, 11 in the last, which has no context MLP and output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline; its INT4 folder has only a config, because tests replace `open_transformer`."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny.tiny_pipeline(folder)
    (folder / "transformer_int4").mkdir()
    shutil.copyfile(folder / "transformer" / "config.json", folder / "transformer_int4" / "config.json")
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return two_blocks()


@pytest.fixture(scope="module")
def exported(
    source: Path,
    model: nn.Module,
    tiny_folders: tuple[Path, Path],
    quantised_onnx: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """The networks were traced for `quantised_onnx` and `tiny_folders`."""
    out = tmp_path_factory.mktemp("out") / "onnx"
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
        traced.reuse(patch, tiny_folders[1], "text_encoder", "text_encoder_2", "vae_decoder")
        traced.reuse(patch, quantised_onnx, "transformer")
        record = to_onnx.export(source, out, progress=lambda what, *steps: steps or told.append(what))
    assert told == ["transformer", "text_encoder", "text_encoder_2", "vae_decoder"]
    return out, record


# ------------------------------------------------------------------------------------- the layers
# test_integers.py checks that the integers are the checkpoint's.


def test_no_float_copy_of_a_quantised_weight_is_left(exported: tuple[Path, dict[str, Any]], model: nn.Module) -> None:
    path = exported[0] / "transformer" / "model.onnx"
    loaded = onnx.load(str(path))
    nodes = Counter(node.op_type for node in loaded.graph.node)
    assert nodes["DequantizeLinear"] == LAYERS and not loaded.functions
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 21)]
    made_by = {name: node for node in loaded.graph.node for name in node.output}
    consumers = [n for n in loaded.graph.node for i in n.input if i in made_by and made_by[i].op_type[:3] == "Deq"]
    assert {n.op_type for n in consumers} == {"MatMul"}  # no Transpose between
    stored = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith("weight_packed"))
    weights = [t for t in loaded.graph.initializer if t.name.endswith("weight_packed.T")]
    assert sum(len(t.raw_data) for t in weights) == stored
    assert not [t.name for t in loaded.graph.initializer if t.data_type == onnx.TensorProto.UINT8]


# ------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens"),
    [(1, 8, 8, 16), (4, 3, 2, 272), (2, 7, 16, 1), (1, 16, 15, 21), (3, 5, 5, 5)],
)
def test_other_sizes_than_the_traced(
    exported: tuple[Path, dict[str, Any]], model: nn.Module, batch: int, height: int, width: int, tokens: int
) -> None:
    wrapper = modules.Transformer(model)
    example = wrapper.example(batch=batch, height=height, width=width, tokens=tokens, seed=9)
    runner = parity.session(exported[0] / "transformer" / "model.onnx")
    (found,) = runner.run(["out_hidden_states"], {k: v.numpy() for k, v in example.items()})
    with torch.no_grad():
        expected = model(**example, return_dict=False)[0].numpy()
    assert found.shape == expected.shape and found.dtype == np.float32
    assert parity.relative_error(found, expected)[0] < 1e-5


def test_a_chunk_is_closed_before_onnx_runtime_opens_it(exported: tuple[Path, dict[str, Any]]) -> None:
    """Windows opens no file twice."""
    path, opened = exported[0] / "text_encoder" / "model.onnx", []

    def session(file: Path) -> Any:
        opened.append(file.name)
        assert str(file) not in {open_file.path for open_file in psutil.Process().open_files()}
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    chunked_onnx.ChunkedOnnx(path, session, limit=1).run(None, {"input_ids": np.ones((1, 16), np.int64)})
    assert len(opened) > 3 and list(path.parent.glob(f"{unfinished.SCRATCH}*")) == []


def test_text_encoder_on_real_prompts(exported: tuple[Path, dict[str, Any]], source: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(source / "text_encoder").float().eval()
    prompts = ["", "two red circles", "a small ring in the middle " * 9]
    ids = tiny.tiny_tokenizer()(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    path = exported[0] / "text_encoder" / "model.onnx"
    runner = parity.session(path)
    names = ["text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
    assert [o.name for o in onnx.load(str(path)).graph.output] == names
    found = dict(zip(names, runner.run(None, {"input_ids": ids.input_ids.numpy()}), strict=True))
    with torch.no_grad():
        expected = encoder(ids.input_ids, output_hidden_states=True)
    assert parity.relative_error(found["text_embeds"], expected.text_embeds.numpy())[0] < 1e-5
    # diffusers reads this state; optimum finds it among hidden_states.0 to .(layers - 1) and last_hidden_state.
    assert parity.relative_error(found["hidden_states.1"], expected.hidden_states[-2].numpy())[0] < 1e-5


def test_axes_have_the_names_that_optimum_evaluates(exported: tuple[Path, dict[str, Any]]) -> None:
    def axes(name: str) -> dict[str, list[str | int]]:
        loaded = onnx.load(str(exported[0] / name / "model.onnx"), load_external_data=False).graph
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in [*loaded.input, *loaded.output]
        }

    assert axes("transformer") == {
        "hidden_states": ["batch_size", 8, "height", "width"],
        "encoder_hidden_states": ["batch_size", "sequence_length", 64],
        "pooled_projections": ["batch_size", 64],
        "timestep": ["batch_size"],
        "out_hidden_states": ["batch_size", 8, "height", "width"],
    }
    assert axes("vae_decoder")["sample"] == ["batch_size", 3, "latent_height * 8", "latent_width * 8"]
    assert axes("text_encoder")["text_embeds"] == ["batch_size", 32]


# ------------------------------------------------------------------------------------- the folder


def test_folder(exported: tuple[Path, dict[str, Any]], source: Path) -> None:
    out, record = exported
    assert json.loads((out / folder.FILE).read_text()) == record
    assert (record["schema_version"], record["target"], record["opset"], record["quantized"]) == (1, "onnx", 21, True)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {folder.FILE}
    assert files == set(record["files"])
    assert files >= {
        *("model_index.json", "generation.json", "scheduler/scheduler_config.json"),
        *(f"{n}/{f}" for n in ("transformer", "text_encoder", "vae_decoder") for f in ("model.onnx", "config.json")),
        *(f"tokenizer_2/{f}" for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")),
    }
    assert not [f for f in files if f.endswith((".safetensors", ".tmp"))]
    # The exporter writes stack traces, which contain paths of this machine.
    assert b".py" not in (out / "transformer" / "model.onnx").read_bytes()
    assert {f: sha256_file(out / f) for f in files} == record["files"]
    assert json.loads((out / "generation.json").read_text()) == tiny.GENERATION | {"solver": "euler"}
    assert json.loads((out / "vae_decoder" / "config.json").read_text())["scaling_factor"] == 1.3
    assert set(record["parity"]) == {"transformer", "text_encoder", "text_encoder_2", "vae_decoder"}
    for found in record["parity"].values():
        assert len(found["shapes"]) >= 2 and 0 < found["max_relative"] < 1e-5
    assert sorted(p.name for p in out.parent.iterdir()) == ["onnx"]


def test_tokenizer_alone_gives_the_same_ids(exported: tuple[Path, dict[str, Any]]) -> None:
    raw = Tokenizer.from_file(str(exported[0] / "tokenizer" / "tokenizer.json"))
    for prompt in ("", "two red circles", "Three BLUE stars, oddly"):
        assert raw.encode(prompt).ids == tiny.tiny_tokenizer()(prompt).input_ids
    vocab = json.loads((exported[0] / "tokenizer" / "vocab.json").read_text())
    assert vocab == raw.get_vocab()


@pytest.fixture()
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Replace the slow part with a function of the partial folder."""

    def use(action: Callable[[Path], None]) -> None:
        def networks(_artefact: Path, work: unfinished.Unfinished, *_: Any) -> dict[str, Any]:
            action(work.folder)
            return {}

        monkeypatch.setattr(to_onnx, "networks", networks)

    return use


def test_a_previous_export_is_replaced(source: Path, tmp_path: Path, fake: Callable[..., None]) -> None:
    out = tmp_path / "onnx"
    fake(lambda partial: (partial / "first").touch())
    to_onnx.export(source, out)
    (tmp_path / "onnx.partial").mkdir()
    (tmp_path / "onnx.partial" / "of a killed run").touch()
    fake(lambda partial: (partial / "second").touch())
    assert "second" in to_onnx.export(source, out)["files"]
    assert (out / "second").exists() and not (out / "first").exists() and not (out / "of a killed run").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_the_export_of_another_artefact_is_not_replaced(
    source: Path, tmp_path: Path, fake: Callable[..., None]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(source, tmp_path / "made" / name)
    out, written = tmp_path / "made" / "onnx", list[Path]()
    fake(written.append)
    assert to_onnx.export(tmp_path / "made" / "one", out)["artefact"] == "one"
    with pytest.raises(InputError, match=r"onnx: found the export of one, expected one of two; give another -o, or re"):
        to_onnx.export(tmp_path / "made" / "two", out)
    assert len(written) == 1 and not out.with_name("onnx.partial").exists()
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    to_onnx.export(moved / "one", moved / "onnx")
    assert len(written) == 2


@pytest.mark.parametrize(
    ("raised", "expected", "kept"),
    [
        (ParityError("transformer: found 1"), ParityError, False),
        (OSError(errno.ENOSPC, "No space left on device"), DiskError, True),
        (KeyboardInterrupt(), KeyboardInterrupt, True),
    ],
)
def test_failure_leaves_the_previous_export(
    source: Path,
    tmp_path: Path,
    fake: Callable[..., None],
    raised: BaseException,
    expected: type[BaseException],
    kept: bool,
) -> None:
    out = tmp_path / "onnx"
    fake(lambda partial: (partial / "first").touch())
    to_onnx.export(source, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def fail(partial: Path) -> None:
        (partial / "half").write_text("half")
        raise raised

    fake(fail)
    with pytest.raises(expected, match="space|found|"):
        to_onnx.export(source, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(expected):
        to_onnx.export(source, tmp_path / "other")
    left = ["onnx", "onnx.partial", "other.partial"] if kept else ["onnx"]  # to resume from: test_resume_export.py
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_nibbles_of_the_wrong_order_fail_parity(
    exported: tuple[Path, dict[str, Any]],
    source: Path,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test the parity check itself: swap the nibbles of one layer in the file."""

    def swapped(*_: Any, **__: Any) -> ir.Model:
        built = ir.load(exported[0] / "transformer" / "model.onnx")
        value = built.graph.initializers["transformer_blocks.1.attn.to_q.weight_packed.T"]
        raw = np.frombuffer(value.const_value.tobytes(), np.uint8)
        value.const_value = ir.PackedTensor(raw >> 4 | raw << 4, ir.DataType.INT4, shape=value.shape, name=value.name)
        return built

    monkeypatch.setattr(graph, "to_ir", swapped)
    monkeypatch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
    with pytest.raises(ParityError, match=r"transformer: out_hidden_states: found a relative error of .* 1e-03"):
        to_onnx.export(source, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_ours_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, text in (("thesis", "without edgeprune_export.json"), ("file", "found a file")):
        with pytest.raises(InputError, match=text):
            to_onnx.export(source, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]


def test_bad_sources_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        to_onnx.export(tmp_path / "nowhere", tmp_path / "out")
    index = json.loads((source / "model_index.json").read_text())
    bad = tmp_path / "bad"
    shutil.copytree(source / "transformer", bad / "transformer")
    for change, text in (
        ({"_class_name": "FluxPipeline"}, "_class_name: found 'FluxPipeline', expected 'StableDiffusion3Pipeline'"),
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "tokenizer_3: found"),
        ({"vae": [None, None]}, "vae: found"),
        ({}, "scheduler: no such folder, though model_index.json lists it"),
    ):
        (bad / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match=text):
            to_onnx.export(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_damaged_weights_are_the_users_error(
    source: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    weights = bad / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
    with pytest.raises(InputError, match="text_encoder/model.safetensors: not whole safetensors"):
        to_onnx.export(bad, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_float_folder(tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export the transformer of an uncompressed folder with the real loader; the image size comes from its config."""
    traced.only(monkeypatch, "transformer")
    traced.reuse(monkeypatch, tiny_folders[1], "transformer")
    folder = Path(shutil.copytree(tiny_folders[0], tmp_path / "float"))
    (folder / "generation.json").unlink()
    record = to_onnx.export(folder, tmp_path / "onnx")
    assert record["quantized"] is False and record["parity"]["transformer"]["max_relative"] < 1e-5
    nodes = Counter(n.op_type for n in onnx.load(str(tmp_path / "onnx" / "transformer" / "model.onnx")).graph.node)
    assert nodes["DequantizeLinear"] == 0
    generation = json.loads((tmp_path / "onnx" / "generation.json").read_text())
    assert (generation["height"], generation["width"], generation["num_inference_steps"]) == (64, 64, 28)


# ------------------------------------------------------------------------------------- small things


def test_only_one_import_name() -> None:
    run = subprocess.run([sys.executable, "-c", "import export"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "import this package as edgeprune.export" in run.stderr
