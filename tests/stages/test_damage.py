"""Damaged files, hostile folders and a full disk end in one clear error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stage_runs import edit, truncate

import edgeprune
from edgeprune.artefact.writing import save_transformer
from edgeprune.common import tensors
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.stages.workspace import Workspace


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: truncate(d / "transformer_int4" / "diffusion_pytorch_model.safetensors"), "SHA-256"),
        (lambda d: (d / "transformer_int4" / "diffusion_pytorch_model.safetensors").unlink(), "no such file"),
        (lambda d: (d / "edgeprune.json").write_text("{"), "not readable as JSON"),
        (lambda d: edit(d / "edgeprune.json", "schema_version", 99), "schema_version: found 99.*upgrade"),
        (lambda d: edit(d / "edgeprune.json", "schema_version", 0), "found 0, expected 1; make the artefact again"),
        (lambda d: edit(d / "edgeprune.json", "files", {"transformer_int4/../../x": "0"}), "out of the folder"),
        (
            lambda d: edit(d / "transformer" / "config.json", "_class_name", "UNet2DConditionModel"),
            "expected an MMDiT",
        ),
        (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
    ],
)
def test_damage_is_one_clear_error(copy: Path, damage: object, words: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(InputError, match=words):
        edgeprune.load(copy)


def test_truncated_source_weights(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    truncate(broken / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="not whole safetensors"):
        Workspace(tmp_path / "o", str(broken)).pipe  # noqa: B018


def test_disk_full_leaves_what_was_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copy / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "write_safetensors", full)
    with pytest.raises(EdgepruneError, match="disk full"):
        save_transformer(copy, "transformer", {}, {"x": torch.zeros(3)})
    assert (copy / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert not (copy / "transformer.tmp").exists()


@pytest.mark.parametrize("index", [{"vae": ["evil", "Vae"]}, {"_class_name": ["pipeline", "Evil"]}])
def test_a_folder_cannot_bring_code(source: Path, tmp_path: Path, index: dict[str, object]) -> None:
    evil = Path(shutil.copytree(source, tmp_path / "evil"))
    for name in ("evil.py", "pipeline.py"):
        (evil / name).write_text("raise SystemExit(9)")
    path = evil / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(InputError, match="model_index.json"):
        edgeprune.load(evil)
