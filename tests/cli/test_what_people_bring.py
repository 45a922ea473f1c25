"""What people bring, through the command line: each input is read as meant, or refused in one line before any work."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.common.errors import EdgepruneError

PRUNE = ["--method", "manual", "--blocks", "1", "--steps", "0", "--calibration", "none", "--preset", "quick"]


def run(*words: str) -> tuple[str, str]:
    """Return the error of a command, empty if there is none, and what it printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes, which main() prints as lines
        found = CliRunner().invoke(app, list(words))
    if isinstance(found.exception, EdgepruneError):
        assert found.exception.exit_code == 2 and "\n" not in str(found.exception)
        return str(found.exception), found.output
    if found.exit_code != 2 and found.exception is not None:
        raise found.exception
    return found.output if found.exit_code == 2 else "", found.output


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model M, and `small`, which is M without one block."""
    root = tmp_path_factory.mktemp("brought")
    tiny_pipeline(root / "M")
    error, _ = run("compress", str(root / "M"), "-o", str(root / "small"), *PRUNE)
    assert not error
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reweighted(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a file."""
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def mixed_shards(part: Path) -> None:
    """Split a text encoder into a shard of float32 and one of bfloat16."""
    tensors = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file, dtype in zip(sorted(set(files.values())), (torch.float32, torch.bfloat16), strict=True):
        save_file({n: tensors[n].to(dtype) for n in names if files[n] == file}, part / file, {"format": "pt"})
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def old_tokenizer(part: Path) -> None:
    """Store a tokenizer as vocabulary and merges, as before there was tokenizer.json."""
    model = json.loads((part / "tokenizer.json").read_text())["model"]
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(model["vocab"]))
    (part / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")


def pickled(part: Path) -> None:
    """Store a text encoder as people did before safetensors."""
    (part / "model.safetensors").rename(part / "pytorch_model.bin")


def wan(folder: Path) -> None:
    """Make the folder look like another pipeline with a transformer."""
    changed(folder / "model_index.json", _class_name="WanPipeline", transformer=["diffusers", "WanTransformer3DModel"])
    (folder / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_layers": 40}')


def unet(folder: Path) -> None:
    """Make the folder look like SDXL."""
    changed(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    (folder / "transformer").rename(folder / "unet")


def index(**fields: Any) -> Callable[[Path], None]:
    """Change fields of model_index.json."""
    return lambda folder: changed(folder / "model_index.json", **fields)


def text(name: str, content: str) -> Callable[[Path], None]:
    """Write a file of the folder."""
    return lambda folder: (folder / name).write_text(content) and None


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "named after another place": (index(_name_or_path="/gone/elsewhere"), ""),
    "vocabulary and merges": (lambda f: old_tokenizer(f / "tokenizer"), ""),
    "shards of several dtypes": (lambda f: mixed_shards(f / "text_encoder"), ""),
    "float64": (lambda f: reweighted(f / "text_encoder" / "model.safetensors", lambda _, t: t.double()), ""),
    "tokenizer without a vocabulary": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "found no vocabulary"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2: no such folder"),
    "NaN in a config": (text("vae/config.json", '{"scaling_factor": NaN}'), "found NaN, expected a finite number"),
    "scheduler of null": (index(scheduler=[None, None]), "scheduler: found [None, None], expected a library"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler: no such folder"),
    "a part without a folder": (index(image_encoder=["transformers", "CLIPVisionModel"]), "image_encoder: no such"),
    "a pickle": (lambda f: pickled(f / "text_encoder"), "found pytorch_model.bin, expected safetensors; pickles"),
    "an empty file": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b""), "not whole"),
    "SDXL": (unet, "not an MMDiT pipeline ('StableDiffusionXLPipeline'"),
    "Wan": (wan, "WanTransformer3DModel"),
    "with a ControlNet": (index(_class_name="StableDiffusion3ControlNetPipeline"), "pipelines that take more than"),
    "index of a list": (text("model_index.json", "[1]"), "found a JSON list, expected an object"),
    "index with a comment": (text("model_index.json", "// mine\n{}"), "model_index.json: not readable as JSON"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, brought: Path, here: Path) -> None:
    change, words = MODELS[name]
    change(shutil.copytree(brought / "M", here / "a model ü"))
    error, _ = run("compress", "a model ü", "-o", "out", *PRUNE, "--dry-run")
    assert words in error if words else not error
    assert [path.name for path in here.iterdir()] == ["a model ü"]


def test_weights_that_are_no_numbers(brought: Path, here: Path) -> None:
    """Its images would all be one colour, and equal to the original's."""
    shutil.copytree(brought / "M", here / "M")
    reweighted(here / "M" / "text_encoder" / "model.safetensors", lambda _, t: t * float("nan"))
    error, _ = run("generate", "a dog", "--model", "M", "-o", "x.png")
    assert "found NaN or infinity" in error and not (here / "x.png").exists()


def test_an_artefact_that_is_not_quantised(brought: Path, here: Path) -> None:
    shutil.copytree(brought / "small", here / "small")
    shutil.rmtree(here / "small" / "transformer_int4")
    with pytest.warns(UserWarning, match="small: is not quantised, .*: edgeprune quantize -o small"):
        CliRunner().invoke(app, ["generate", "a dog", "--model", "small", "-o", "x.png"], catch_exceptions=False)


def test_another_plan_leaves_no_page_and_no_card(brought: Path, here: Path) -> None:
    """They would tell of the old plan until the next report."""
    shutil.copytree(brought / "small", here / "small")
    assert not run("plan", "-o", "small", "--method", "manual", "--blocks", "2", "--fresh")[0]
    assert not {"README.md", "report.html"} & {path.name for path in (here / "small").iterdir()}
    shutil.copytree(brought / "small", here / "own")
    (here / "own" / "README.md").write_text("My own words.")
    assert not run("plan", "-o", "own", "--method", "manual", "--blocks", "2", "--fresh")[0]
    assert (here / "own" / "README.md").read_text() == "My own words."


def test_what_is_not_trained_is_said_when_work_begins(brought: Path, here: Path) -> None:
    error, said = run("compress", str(brought / "M"), "-o", "x", "--keep", "2")
    assert "--keep: found 2.0" in error and "not distilled" not in said
    error, said = run("compress", str(brought / "M"), "-o", "x", "--keep", "1", "--dry-run")
    assert not error and "not distilled" not in said


PLACES = {
    "M/..": "no model_index.json; expected a diffusers pipeline folder; did you mean",
    "M/transformer": "no model_index.json; expected a diffusers pipeline folder; did you mean",
    "M/model_index.json": "found a file, expected a folder; did you mean",
    "nowhere": "no such folder",
    "small/plan.json": "found a file, expected a folder; did you mean",
    "small-onnx": "is an export, expected a diffusers pipeline folder",
    "controlnet": "no model_index.json",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_no_model(place: str, brought: Path, here: Path) -> None:
    shutil.copytree(brought / "M", here / "M")
    shutil.copytree(brought / "small", here / "small" if "small/" in place else here / "M" / "small")
    for folder in ("small-onnx", "controlnet"):
        (here / folder).mkdir()
        (here / folder / "config.json").write_text('{"_class_name": "SD3ControlNetModel"}')
    (here / "small-onnx" / "edgeprune_export.json").write_text("{}")
    shutil.copy(here / "M" / "model_index.json", here / "small-onnx")
    if place == "M/..":
        shutil.rmtree(here / "small-onnx")
    error, _ = run("compress", place, "-o", "out", *PRUNE)
    assert PLACES[place] in error and not (here / "out").exists()


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> bytes:
    """Encode a red image."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """Encode a phone's picture: two images in one file, turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("MPO", (64, 32), save_all=True, append_images=[Image.new("RGB", (64, 32), "blue")], exif=exif)


def packed(files: dict[str, bytes]) -> bytes:
    """Pack files as `tar c .` does, with extended headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {"./": b"", **files}.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name == "./" else tarfile.REGTYPE
            info.size, info.pax_headers = len(content), {"mtime": "1.5"}
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def rows(*texts: object) -> dict[str, bytes]:
    """Return an imagefolder with these captions."""
    lines = "\n".join(json.dumps({"file_name": "1.png", "text": text}) for text in texts)
    return {"1.png": picture(), "metadata.jsonl": lines.encode()}


NOTHING = "no image with a caption that can be used"
DATA: dict[str, tuple[dict[str, bytes], str]] = {
    "csv of a spreadsheet": (
        {"1.png": picture(), "metadata.csv": 'file_name;text\r\n1.png;"a; red, ""square"""\r\n'.encode("utf-16")},
        "0 of 1 skipped",
    ),
    "csv with tabs": ({"1.png": picture(), "metadata.csv": b"file_name\ttext\n1.png\ta, b\n"}, "0 of 1 skipped"),
    "captions over two lines": (
        {"1.png": picture(), "metadata.csv": b'file_name,text\n1.png,"a red\nsquare"\n'}, "0 of 1 skipped",
    ),
    "another table": ({"1.png": picture(), "metadata.csv": b"image,text\n1.png,x\n"}, "expected file_name and text"),
    "tar c .": ({"0.tar": packed({"./é/1.png": picture(), "./é/1.txt": b"red"})}, "0 of 1 skipped"),
    "half a tar": ({"0.tar": packed({"./1.png": picture(), "./1.txt": b"red"})[:2100]}, "not a complete tar archive"),
    "lists, objects and numbers": (
        rows(["", "b"], {"en": "c"}, 5, float("nan"), [], "d"), "4 of 6 skipped: 3 caption: found …, expected text;"
    ),
    "missing files": (
        rows("a") | {"metadata.jsonl": rows("a")["metadata.jsonl"] + b'\n{"file_name": "2.png", "text": "b"}'},
        "1 of 2 skipped: 1 no such file or directory",
    ),
    "a phone's pictures": ({"1.jpg": rotated(), "1.txt": b"red"}, "0 of 1 skipped"),
    "one pixel": ({"1.png": picture(size=(1, 1)), "1.txt": b"red"}, "0 of 1 skipped"),
    "empty files": ({"1.png": b"", "1.txt": b"red"}, NOTHING),
    "an error page": ({"1.jpg": b"<html>404</html>", "1.txt": b"red"}, f"{NOTHING}: 1.jpg: not a readable image"),
    "texts in Latin-1": (
        {"1.png": picture(), "1.txt": "carré".encode("latin-1"), "2.png": picture(), "2.txt": b"red"},
        "1 of 2 skipped: 1 its .txt is not readable as text",
    ),
    "names in another script": ({"图 1.png": picture(), "图 1.txt": "红色 🟥".encode()}, "0 of 1 skipped"),
    "no captions": ({"1.png": picture()}, "found images without captions"),
    "a Parquet data set": ({"data/train-0.parquet": b"PAR1"}, "found Parquet files; expected datasets:data"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_data_set(name: str, brought: Path, here: Path) -> None:
    files, words = DATA[name]
    for file, content in files.items():
        (here / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (here / "data" / file).write_bytes(content)
    error, said = run("cache", "data", "--model", str(brought / "M"), "-o", "my data")
    assert words in (error or said)
    assert bool(error) != (here / "my data" / "cache.json").is_file()
    assert error or "next: edgeprune distill -o small --data 'my data'" in said


LAYER = "transformer.transformer_blocks.0.attn.to_q"


def lora(layer: str = LAYER, *, width: int = 64, **dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make a LoRA of one layer."""
    shapes = {"lora_A": (4, width), "lora_B": (width, 4)}
    return {f"{layer}.{name}.weight": torch.ones(shape, **dtype) for name, shape in shapes.items()}


LORAS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "bfloat16": (lora(dtype=torch.bfloat16), "2 kept"),
    "zeros": ({name: tensor * 0 for name, tensor in lora().items()}, "2 kept"),
    "names of two trainers": (lora() | lora("diffusion_model.joint_blocks.0.x_block.attn.proj"), "4 kept"),
    "one layer twice": (lora() | lora("lora_transformer_transformer_blocks_0_attn_to_q"), "expected a file of one"),
    "fp8": ({n: t.to(torch.float8_e4m3fn) for n, t in lora().items()}, "found F8_E4M3"),
    "no tensors": ({}, "it is empty"),
    "another width": (lora(width=3072), "the LoRA is for another model, or for another size of it"),
    "another model": (lora("diffusion_model.blocks.0.self_attn.q"), "layers that the model lacks"),
    "more blocks": (lora("transformer.transformer_blocks.37.attn.to_q"), "layers that the model lacks"),
    "a removed block": (lora("transformer.transformer_blocks.1.attn.to_q"), "all of its 1 layers are gone"),
    "one half": ({f"{LAYER}.lora_A.weight": torch.ones(4, 64)}, "found only one half of a LoRA"),
    "NaN": ({name: tensor * float("nan") for name, tensor in lora().items()}, "found NaN or infinity"),
    "a trainer's counter": (lora() | {"step": torch.tensor(5.0)}, "found 'step', expected LoRA"),
    "an embedding": ({"clip_l": torch.ones(2, 32)}, "found 'clip_l', expected LoRA"),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora(name: str, brought: Path, here: Path) -> None:
    tensors, words = LORAS[name]
    save_file(tensors, here / "my style.safetensors")
    error, said = run("lora", "my style.safetensors", "--model", str(brought / "small"), "-o", "x.safetensors")
    assert words in (error or said)
    assert bool(error) != (here / "x.safetensors").exists()


def test_a_lora_is_not_overwritten(brought: Path, here: Path) -> None:
    save_file(lora(), here / "style.safetensors")
    before = (here / "style.safetensors").read_bytes()
    (here / "same.safetensors").symlink_to("style.safetensors")
    for out in ("style.safetensors", "./style.safetensors", "same.safetensors"):
        error, _ = run("lora", "style.safetensors", "--model", str(brought / "small"), "-o", out)
        assert error.endswith(": is the LoRA itself, which would be lost; use another name")
    assert (here / "style.safetensors").read_bytes() == before


COMMANDS = {
    "generate hi --model {M} -o x.png --steps 1000000": "found 1000000, expected a number from 1 to",
    "generate hi --model {M} -o x.png --guidance-scale nan": "guidance_scale: found nan, expected a number from 0",
    "generate hi --model {M} -o x.png --guidance-scale=-1": "guidance_scale: found -1.0, expected a number from 0",
    "generate hi --model {M} -o x.png --height 63": "--height: found 63, expected a multiple of 8",
    "generate hi --model {M}/transformer -o x.png": "found neither edgeprune_export.json",
    "compress {M} -o {M} --steps 0 --keep 1": "exists and is not a folder of edgeprune",
    "export {M} -o {M}": "found a folder without edgeprune_export.json, expected a new or empty folder",
    "lora {M}/model_index.json --model {M} -o x.safetensors": "not an artefact folder",
    "cache {M} --model {M} -o x": "not a known source",
    "plan -o {M}": "no such file; begin with: edgeprune analyze MODEL",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command(line: str, brought: Path, here: Path) -> None:
    error, _ = run(*(word.format(M=brought / "M") for word in line.split()))
    assert COMMANDS[line] in error
    assert not list(here.iterdir())
