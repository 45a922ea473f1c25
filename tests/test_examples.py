"""The examples of docs/sources.md run: on a tiny model, with a hub on this machine, where what it names exists.

Only options are added that make `compress` take a second: its plan is given, and one step of training.
"""

from __future__ import annotations

import io
import shlex
import shutil
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import singles
import torch
from hub_server import serving
from PIL import Image
from safetensors.torch import save_file
from test_docs import ROOT, typed
from tiny import tiny_flux_pipeline, tiny_pipeline
from typer.testing import CliRunner

from edgeprune.cli import app

TYPED = [shlex.split(line, comments=True)[1:] for line in typed(ROOT / "docs" / "sources.md", "edgeprune")]
SINGLE = [words for words in TYPED if words[0] == "convert" or "flux1-dev" in words]
EXAMPLES = [words for words in TYPED if words not in SINGLE]
QUICK = ["--method", "manual", "--blocks", "1", "--steps"]
LAYER = "transformer.transformer_blocks.0.attn.to_q"


def picture() -> bytes:
    """Encode a red image."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name, besides what an example before them makes."""
    root = tmp_path_factory.mktemp("examples")
    tiny_pipeline(root / "sd3.5-medium")
    for name in ("images", "shards"):
        (root / name).mkdir()
    files = {"1.png": picture(), "1.txt": b"a red square"}
    for name, content in files.items():
        (root / "images" / name).write_bytes(content)
    with tarfile.open(root / "shards" / "0.tar", "w") as archive:
        for name in files:
            archive.add(root / "images" / name, name)
    (root / "prompts.txt").write_text("a red square\na blue circle\n")
    lora = {f"{LAYER}.lora_A.weight": torch.ones(4, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 4)}
    save_file(lora, root / "style.safetensors")
    return root


@pytest.fixture(scope="module")
def repository(place: Path) -> dict[str, Path]:
    """The model's branches on the hub: `main`, with weights of two variants, and `v2`."""
    main = Path(shutil.copytree(place / "sd3.5-medium", place / "hub" / "main"))
    for file in main.rglob("*model.safetensors"):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    return {"main": main, "v2": place / "sd3.5-medium"}


@pytest.fixture(scope="module")
def singles_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the single files that the examples name, and the models that give their configs."""
    root = tmp_path_factory.mktemp("singles")
    tiny_flux_pipeline(root / "FLUX.1-dev")
    tiny_pipeline(root / "sd3.5-large")
    flux = singles.original(singles.weights(root / "FLUX.1-dev" / "transformer"), sd3=False)
    singles.save(flux, root / "flux1-dev.safetensors")
    singles.write_gguf(flux, root / "flux1-dev-Q8_0.gguf", "Q8_0")
    sd3 = singles.weights(root / "sd3.5-large" / "transformer")
    singles.save(singles.original(sd3, sd3=True), root / "sd3.5_large.safetensors")
    folder = Path(shutil.copytree(root / "sd3.5-large", root / "sd3.5-medium-fp8")) / "transformer"
    (file,) = folder.glob("*.safetensors")
    singles.save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in sd3.items()}, file)
    return root


@pytest.fixture
def at_singles(singles_place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to type the examples of single files in, online."""
    with online({"main": singles_place / "FLUX.1-dev"}, "black-forest-labs/FLUX.1-dev", singles_place, monkeypatch):
        yield singles_place


@contextmanager
def online(refs: dict[str, Path], name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve a repository on this machine, with a cache in `place`, which becomes the current folder."""
    with serving(refs, name) as server:
        monkeypatch.chdir(place)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Versions before 1 import it by name.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
        yield


@pytest.fixture
def here(place: Path, repository: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to type the examples in, online."""
    with online(repository, "me/sd3.5-medium", place, monkeypatch):
        yield place


def run(*words: str) -> None:
    """Run a command; it must succeed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes, which main() prints as lines
        found = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_an_example_runs(words: list[str], here: Path) -> None:
    verb, out = words[0], words[words.index("-o") + 1]
    if verb == "compress" and (here / out).exists():
        out = f"{out}-of-{len(list(here.iterdir()))}"  # the reader chooses one of these commands
        words = [out if word == words[words.index("-o") + 1] else word for word in words]
    run(*words, *([*QUICK, "1" if "--data" in words else "0"] if verb == "compress" else []))
    assert (here / out).exists()


@pytest.mark.parametrize("words", SINGLE, ids=" ".join)
def test_an_example_of_single_files_runs(words: list[str], at_singles: Path) -> None:
    """In their order: the second opens what the first has made, with the configs from the hub."""
    out = at_singles / words[words.index("-o") + 1]
    if "--dry-run" in words:
        shutil.rmtree(out)
    run(*words, *([*QUICK, "0"] if words[0] == "compress" else []))
    assert (out / "transformer" / "config.json").is_file() is ("--dry-run" not in words)


def test_there_are_examples_of_every_section() -> None:
    assert {words[0] for words in TYPED} == {"compress", "cache", "lora", "convert"}
