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
from pathlib import Path

import pytest
import torch
from hub_server import serving
from PIL import Image
from safetensors.torch import save_file
from test_docs import ROOT, typed
from tiny import tiny_pipeline
from typer.testing import CliRunner

from edgeprune.cli import app

TYPED = [shlex.split(line, comments=True)[1:] for line in typed(ROOT / "docs" / "sources.md", "edgeprune")]
EXAMPLES = [words for words in TYPED if words[0] != "convert" and "flux1-dev" not in words]
"""Without those of single files: artefact/test_convert.py runs `convert` on every kind of file."""
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


@pytest.fixture
def here(place: Path, repository: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to type the examples in, online."""
    with serving(repository, "me/sd3.5-medium") as server:
        monkeypatch.chdir(place)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
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


def test_there_are_examples_of_every_section() -> None:
    assert {words[0] for words in EXAMPLES} >= {"compress", "cache", "lora"}
