"""Prepacked weights on disk: the same results; created once, and again after any change."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgeprune import runtimes
from edgeprune.common.errors import InputError
from edgeprune.runtimes import ort, prepack
from edgeprune.runtimes.providers import choose

CHOICE = choose(["CPUExecutionProvider"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were prepacked."""
    found: list[Path] = []
    real = prepack._make

    def make(path: Path, folder: Path, options: Any) -> None:
        found.append(path)
        real(path, folder, options)

    monkeypatch.setattr(prepack, "_make", make)
    return found


def network(model: Path, cache: Path, **options: Any) -> ort.OrtNetwork:
    return ort.OrtNetwork(model / "model.onnx", lambda: ort.session_options(threads=1, **options), CHOICE, cache)


@pytest.fixture
def model(tiny_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders[1] / "text_encoder", tmp_path / "text_encoder"))


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_the_same_latents(tiny_folders: tuple[Path, Path], tmp_path: Path, made: list[Path]) -> None:
    cache = tmp_path / "a" / "cache"
    with runtimes.load(tiny_folders[1], "ort", threads=1) as plain:
        expected = plain.generate_latents("two red circles", seed=3)
        pixels = plain.backend.decode(expected)
    for _ in range(2):
        with runtimes.load(tiny_folders[1], "ort", threads=1, cache_dir=cache) as ours:
            np.testing.assert_allclose(ours.generate_latents("two red circles", seed=3), expected, atol=1e-5)
            np.testing.assert_allclose(ours.backend.decode(expected), pixels, atol=1e-5)
    assert len(made) == len(entries(cache)) == 4 and not list(cache.glob("tmp*"))


def test_made_again_when_something_changed(model: Path, tmp_path: Path, made: list[Path], monkeypatch: Any) -> None:
    cache = tmp_path / "cache"
    network(model, cache)
    network(model, cache)
    assert len(made) == 1
    (first,) = entries(cache)
    network(model, cache, int8=True)
    (second,) = entries(cache)  # the older one is gone
    assert len(made) == 2 and first != second
    (model / "model.onnx").touch()
    network(model, cache, int8=True)
    assert len(made) == 3
    monkeypatch.setattr(onnxruntime, "__version__", "9.9")
    network(model, cache, int8=True)
    assert len(made) == 4 and len(entries(cache)) == 1


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "no entry", "half an entry", "unreadable"])
def test_damage_is_repaired(model: Path, tmp_path: Path, made: list[Path], damage: str) -> None:
    cache, ids = tmp_path / "cache", np.ones((1, 16), np.int64)
    expected = network(model, cache)(input_ids=ids)["text_embeds"]
    (entry,) = entries(cache)
    file = next(p for p in entry.iterdir() if p.name == "model.onnx")
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "change":
        file.write_bytes(bytes(len(file.read_bytes())))
    elif damage == "remove":
        file.unlink()
    elif damage == "no entry":
        (entry / "entry.json").unlink()
    elif damage == "half an entry":
        (entry / "entry.json").write_text("{")
    else:  # damaged, although the entry matches
        file.write_bytes(b"nothing")
        prepack.write_json(entry / "entry.json", prepack._stamps(entry))
    np.testing.assert_array_equal(network(model, cache)(input_ids=ids)["text_embeds"], expected)
    assert len(made) == 2 and len(entries(cache)) == 1


def test_a_making_that_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    (model / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"text_encoder/model\.onnx: not a complete ONNX model: .*export again"):
        network(model, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir: .*file/cache: .*, expected a writable folder"):
        network(model, tmp_path / "file" / "cache")


def test_another_process_was_quicker(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, make = tmp_path / "cache", prepack._make
    network(model, tmp_path / "other")
    (theirs,) = entries(tmp_path / "other")

    def slow(path: Path, folder: Path, options: Any) -> None:
        make(path, folder, options)
        shutil.copytree(theirs, cache / theirs.name)

    monkeypatch.setattr(prepack, "_make", slow)
    assert network(model, cache).provider == "CPUExecutionProvider"
    (kept,) = entries(cache)
    assert prepack._is_intact(kept) and {p.name for p in kept.iterdir()} == {p.name for p in theirs.iterdir()}


def test_a_disk_without_room_for_the_copy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InputError, match=r"cache_dir: .*cache: found 100 free bytes, expected \d+; free some space"):
        network(model, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
