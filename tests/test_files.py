"""Files on a full disk: one line that says what to do, no half-made file, and what was there untouched."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EdgepruneError
from edgeprune.files import copy_folder, replace_folder, write_json


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_json_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"blocks": [1]})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EdgepruneError, match=r"plan\.json: disk full; free some space"):
        write_json(path, {"blocks": [2]})
    assert "1" in path.read_text() and list(tmp_path.iterdir()) == [path]


def test_copy_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    for name in ("a.json", "inner/b.json", "secret.bin"):
        (source / name).touch()
    copy_folder(source, target, "*.bin")
    assert sorted(p.name for p in target.rglob("*")) == ["a.json", "b.json", "inner"]
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(EdgepruneError, match=r"other.*json: disk full"):
        copy_folder(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_comes_back_if_its_successor_cannot_take_its_place(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", old)
    assert (old / "kept").exists()
