"""Tensors that are kept in memory as far as there is room, and found again after a kill if they are on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeprune.common.errors import DiskError
from edgeprune.residency.spill import Spill

SIX, OTHER = {"x": torch.arange(6.0)}, {"x": torch.ones(2), "y": torch.zeros(1, dtype=torch.bfloat16)}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"identity"}


def test_memory_first_then_files(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "s", room=30)
    spill.put("a", SIX)
    spill.put("b.0", SIX)
    assert files(tmp_path / "s") == {"b.0.safetensors"} and "a" in spill and "b.0" in spill and "c" not in spill
    for key in ("a", "b.0"):
        assert torch.equal(spill.get(key, torch.device("cpu"))["x"], SIX["x"])
    spill.put("b.0", OTHER)  # stays where it is
    assert spill.get("b.0")["y"].dtype == torch.bfloat16 and files(tmp_path / "s") == {"b.0.safetensors"}
    spill.drop("a")
    spill.put("c", SIX)  # into the room that a left
    assert "a" not in spill and files(tmp_path / "s") == {"b.0.safetensors"}
    with pytest.raises(KeyError):
        spill.get("a")
    spill.clear()
    assert not (tmp_path / "s").exists()


def test_without_a_folder_all_is_in_memory() -> None:
    spill = Spill()
    spill.put("a", SIX)
    spill.put("a", OTHER)
    assert spill.get("a")["x"] is OTHER["x"]
    spill.clear()
    assert "a" not in spill


def test_only_the_same_work_finds_what_is_on_disk(tmp_path: Path) -> None:
    Spill(tmp_path, identity="one").put("a.1", SIX)
    (tmp_path / "a.2.safetensors.partial").mkdir()  # of a kill
    again = Spill(tmp_path, identity="one")
    assert torch.equal(again.get("a.1")["x"], SIX["x"]) and "a.2" not in again
    assert "a.1" not in Spill(tmp_path, identity="two") and not files(tmp_path)
    Spill(tmp_path).put("a.1", SIX)
    assert "a.1" not in Spill(tmp_path)  # nothing says that it is the same work


def test_a_damaged_file_starts_all_over(tmp_path: Path) -> None:
    first = Spill(tmp_path, identity="one")
    first.put("a", SIX)
    first.put("b", SIX)
    path = tmp_path / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = Spill(tmp_path, identity="one")
    assert "a" not in again and "b" not in again and not files(tmp_path)


def test_room_is_checked_for_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("edgeprune.residency.spill.need_space", lambda folder, size: needed.append(size))
    spill = Spill(tmp_path)
    spill.need(1000)
    spill.put("a", SIX)
    spill.need(1000)
    spill.need(10)
    Spill().need(1000)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert needed == [1000, 1000 - size, 0]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="file/s"):
        Spill(tmp_path / "file" / "s")
