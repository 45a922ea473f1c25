"""push_to_hub against a hub that only takes note: what is uploaded, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub import FakeHub
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.cli import app
from edgeprune.common.errors import InputError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(FakeHub, "private", {"me/public": False})
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub()


def test_an_artefact_is_uploaded_without_its_caches(fake: FakeHub, copy: Path) -> None:
    (copy / "analysis.json.partial").write_text("")
    (copy / "vae.tmp").mkdir()
    (copy / "vae.tmp" / "config.json").write_text("{}")
    assert (copy / "cache").is_dir()
    expected = api.forecast_push(copy)
    assert not [name for name in expected.files_bytes if name.startswith(("cache", ".", "vae.tmp", "analysis.json.p"))]
    files = {*expected.files_bytes}
    assert {"edgeprune.json", "model_index.json", "README.md", "transformer_int4/config.json"} <= files
    assert expected.total_bytes == sum((copy / name).stat().st_size for name in expected.files_bytes)
    assert fake.calls == [("token", None)]  # of the fixture: nothing was asked yet

    done = api.push_to_hub(copy, "small", revision="int4", token="secret", commit_message="first")
    (_, branch, (_, kept, rest)) = fake.calls[1:]
    assert branch == ("branch", "me/small", "int4") and kept == {*expected.files_bytes}
    assert rest == {"repo_id": "me/small", "revision": "int4", "commit_message": "first"}
    assert done.to_json() == {
        "url": "https://hub.example/me/small", "commit": "c" * 40, "revision": "int4",
        "files": len(kept), "total_bytes": expected.total_bytes,
    }  # fmt: skip
    assert not (copy / ".lock").exists()


def test_an_export_is_uploaded(fake: FakeHub, tiny_folders: tuple[Path, Path]) -> None:
    done = api.push_to_hub(tiny_folders[1], "me/onnx")
    kept, rest = fake.calls[-1][1:]
    assert {"edgeprune_export.json", "vae_decoder/model.onnx"} <= kept and done.files == len(kept)
    assert rest["revision"] is None and done.revision == "main" and "with edgeprune" in rest["commit_message"]


@pytest.mark.parametrize("damage", ["changed", "missing", "unfinished", "linked"])
def test_only_what_is_whole_is_uploaded(damage: str, fake: FakeHub, copy: Path) -> None:
    weights = next((copy / "transformer_int4").glob("*.safetensors"))
    words = "its SHA-256 is not the one in edgeprune.json"
    if damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif damage == "missing":
        weights.unlink()
        words = "no such file, but edgeprune.json lists it"
    elif damage == "linked":
        (copy / "notes.txt").symlink_to("/etc/hostname")
        words = "leads out of the folder"
    else:
        content = json.loads((copy / "edgeprune.json").read_text())
        del content["stages"]["quantize"]
        (copy / "edgeprune.json").write_text(json.dumps(content))
        words = "not finished, quantize was not done"
    with pytest.raises(InputError, match=words):
        api.push_to_hub(copy, "me/small")
    assert len(fake.calls) == 1


def test_other_folders_and_names_are_refused(
    fake: FakeHub,
    source: Path,
    tiny_folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="neither edgeprune.json .* nor edgeprune_export.json"):
        api.push_to_hub(source, "me/m")
    with pytest.raises(InputError, match="nowhere: found no folder"):
        api.push_to_hub(tmp_path / "nowhere", "me/m")
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        api.push_to_hub(source, "https://hub.example/me/m")
    changed = Path(shutil.copytree(tiny_folders[1], tmp_path / "onnx"))
    (changed / "vae_decoder" / "model.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="not the one in edgeprune_export.json"):
        api.push_to_hub(changed, "me/m")
    with pytest.raises(InputError, match="--private: me/public exists and is public"):
        api.push_to_hub(tiny_folders[1], "me/public", private=True)
    assert not [call for call in fake.calls if call[0] == "upload"]


def test_the_hubs_refusal_is_one_line(
    fake: FakeHub, tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(FakeHub, "upload_folder", refuse)
    with pytest.raises(InputError, match=r"me/onnx: the upload failed \(OSError: no network\)"):
        api.push_to_hub(tiny_folders[1], "me/onnx")


def test_the_command(fake: FakeHub, tiny_folders: tuple[Path, Path]) -> None:
    words = ["push", str(tiny_folders[1]), "me/onnx", "--json"]
    found = CliRunner().invoke(app, [*words, "--dry-run"])
    assert json.loads(found.stdout) == api.forecast_push(tiny_folders[1]).to_json()
    assert "nothing was uploaded" in found.stderr and len(fake.calls) == 1
    found = CliRunner().invoke(app, [*words, "--private", "--revision", "int4", "-m", "text"])
    assert json.loads(found.stdout)["revision"] == "int4" and fake.private["me/onnx"] is True
    assert fake.calls[-1][2]["commit_message"] == "text"
    assert "edgeprune.runtimes.load(huggingface_hub.snapshot_download('me/onnx'))" in found.stderr
