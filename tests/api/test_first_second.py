"""Every command refuses a folder that a later stage could not use before it computes, makes or hashes anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.common.errors import DiskError, EdgepruneError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
COMMANDS = {
    "compress": "compress {model} -o {out} --method manual --blocks 1 --steps 0 --calibration none --preset quick",
    "compress --dry-run": "compress {model} -o {out} --method manual --blocks 1 --steps 0 --dry-run",
    "analyze": "analyze {model} -o {out}",
    "analyze --dry-run": "analyze {model} -o {out} --dry-run",
    "cache": "cache captions --model {model} -o {out}",
    "cache --dry-run": "cache captions --model {model} -o {out} --dry-run",
    "compare --dry-run": "compare {model} -o {out} --dry-run --data captions",
    "export": "export {model} -o {out}",
    "generate": "generate x --model {model} -o {out}.png",
    "score": "score {model} --metric shapes -o {out}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 with a T5 that lacks a tensor."""
    folder = tmp_path_factory.mktemp("first") / "model"
    tiny.tiny_pipeline(folder, t5=True, num_layers=2)
    return folder


def without_a_tensor(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    path = folder / "text_encoder_3" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    return folder


def run(command: str, **places: Any) -> BaseException | None:
    result = CliRunner().invoke(app, COMMANDS[command].format(**places).split())
    return result.exception


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_tensor_is_named_and_nothing_is_written(command: str, model: Path, tmp_path: Path) -> None:
    bad = without_a_tensor(model, tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    error = run(command, model=bad, out=tmp_path / "out")
    assert isinstance(error, InputError), error
    assert "text_encoder_3: encoder.final_layer_norm.weight: found no such tensor" in str(error)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != ".out.lock") == before


@pytest.mark.parametrize("command", ["compress", "compress --dry-run"])
def test_a_full_disk_is_named_before_the_folder_is_made(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = run(command, model=model, out=tmp_path / "out")
    assert isinstance(error, DiskError) and "needs 0.0 GB" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compress --dry-run", "cache --dry-run", "generate"])
def test_images_larger_than_the_position_table_are_refused(command: str, model: Path, tmp_path: Path) -> None:
    large = COMMANDS[command].format(model=model, out=tmp_path / "out") + " --height 136"
    error = CliRunner().invoke(app, large.split()).exception
    assert isinstance(error, InputError) and "--height: found 136, expected at most 128, the model's" in str(error)


def test_a_folder_that_differs_a_little_is_taken(model: Path, tmp_path: Path) -> None:
    """An unknown field of the transformer's config is ignored, as diffusers does."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    path = other / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"foo": 1, "quantization_config": {}}))
    assert run("compress --dry-run", model=other, out=tmp_path / "out") is None
    found = run("compress", model=other, out=tmp_path / "out")
    assert not isinstance(found, EdgepruneError), found
    from diffusers import StableDiffusion3Pipeline

    StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")


REFUSED = (
    *(f"{verb} . -o out" for verb in ("compress", "analyze", "compare", "cache captions --model")),
    *(f"{verb} -o out --memory lots" for verb in ("compress", "analyze", "score {model} --metric shapes")),
    *(f"{verb} -o out --time soon" for verb in ("compress", "analyze")),
    *(f"{verb} -o {{begun}} --memory lots" for verb in ("plan", "distill", "quantize", "report")),
    *(f"{verb} -o {{begun}} --time soon" for verb in ("plan", "distill", "quantize", "report")),
    *(f"{verb} -o none" for verb in ("plan", "prune", "distill", "quantize", "report")),
    *(f"verify {rest}" for rest in (".", "--memory lots", "--time soon")),
    *(f"lora x --model {{begun}} -o y --merge {rest}" for rest in ("--memory lots", "--time soon")),
    "study new s --variants a=a b=b --memory lots",
)


def test_bad_input_is_refused_before_torch_is_loaded(model: Path, tmp_path: Path) -> None:
    """It takes seconds."""
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "edgeprune.json").write_text("{}")
    commands = [command.format(model=model, begun=begun) for command in REFUSED]
    code = f"""if True:
        import sys
        from typer.testing import CliRunner
        from edgeprune.cli import app
        from edgeprune.common.errors import InputError
        for command in {commands}:
            found = CliRunner().invoke(app, command.split()).exception
            assert isinstance(found, InputError), (command, found)
            assert isinstance(found, InputError), (command, found)
            assert "torch" not in sys.modules, command
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
