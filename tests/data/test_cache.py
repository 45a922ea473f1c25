"""Reading caches: damaged and hostile files are refused in one line, samples are memory-mapped."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from caching import MIXED, cached, images, opened
from safetensors.torch import load_file, save_file

from edgeprune.common import hashes
from edgeprune.common.errors import InputError
from edgeprune.data.settings import source_digest


def whole(pipe: Any, model: Path, tmp_path: Path) -> Path:
    cached(pipe, model, images(tmp_path / "images", MIXED[:6]), tmp_path / "encoded")
    return tmp_path / "encoded"


def test_a_damaged_shard_is_one_line(pipe: Any, model: Path, tmp_path: Path) -> None:
    folder = whole(pipe, model, tmp_path)
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"shard-00001.safetensors: its SHA-256 is not the one in cache.json"
    ) as raised:
        opened(folder, model)
    assert "\n" not in str(raised.value)
    path.unlink()
    before = json.loads((folder / "cache.json").read_text())
    cached(pipe, model, tmp_path / "images", folder)
    assert json.loads((folder / "cache.json").read_text()) == before


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("shards.0.file", "../shard-00000.safetensors", "shards: 0: file: found '../shard"),
        ("shards.0.file", "/etc/shard.safetensors", "shards: 0: file: found '/etc/shard"),
        ("shards.0.file", "link.safetensors", "shards: 0: file: found 'link.safetensors', which leads out"),
        ("shards.0.file", "cache.json", "shards: 0: file: found"),
        ("shards.0.file", 7, "shards: 0: file: found 7"),
        ("shards.0.sizes", {"64x64": 10**12}, "shards: 0: sizes: 64x64: found 1000000000000"),
        ("shards.0.sizes", {"64x64": -1}, "shards: 0: sizes: 64x64: found -1"),
        ("shards.0.sizes", {"99999x99999": 1}, "shards: 0: sizes: found '99999x99999'"),
        ("shards.0.sizes", {"../x": 1}, "shards: 0: sizes: found '../x'"),
        ("shards.0.sizes", {"64x64": 3}, r"latents.64x64.: found \(4, 8, 8, 8\) F32, expected \(3, 8, 8, 8\)"),
        ("shards.0.sizes", {"64x64": 4, "8x8": 1}, "latents.8x8.: found None"),
        ("shards.0.sizes", [], r"shards: 0: sizes: found \[\]"),
        ("shards.0.skipped", None, "shards: 0: skipped: found None"),
        ("shards.0", [1], r"shards: 0: found \[1\]"),
        ("shards", [], "found no samples"),
        ("shards", {}, "shards: expected a list"),
        ("settings", [], "settings: expected an object"),
        ("settings.samples_per_shard", 10**30, "settings: samples_per_shard: found 1000000000000000000000000000000"),
        ("settings.vae", {"a": 1}, "settings: expected an object"),
        ("complete", 1, "complete: found 1"),
        ("schema_version", 2, "schema_version: found 2, expected 1; a newer edgeprune wrote it"),
    ],
)
def test_a_hostile_index_is_one_line(
    pipe: Any, model: Path, tmp_path: Path, path: str, value: object, said: str
) -> None:
    folder = whole(pipe, model, tmp_path)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "shard-00000.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    data = json.loads((folder / "cache.json").read_text())
    *way, last = path.split(".")
    place: Any = functools.reduce(lambda at, key: at[int(key) if key.isdecimal() else key], way, data)
    place[int(last) if last.isdecimal() else last] = value
    (folder / "cache.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        opened(folder, model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": NaN}', "[" * 100_000])
def test_a_damaged_index_is_one_line(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(InputError, match=r"cache\.json: "):
        opened(tmp_path, model)
    with pytest.raises(InputError, match=r"cache\.json: "):
        source_digest(str(tmp_path), None)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("rows.64x64", torch.tensor([0, 1, 2, 99]), "rows.64x64: found 0 to 99, expected texts from 0 to"),
        ("rows.64x64", torch.tensor([0, 1, 2, -1]), "rows.64x64: found -1 to 2, expected texts from 0 to"),
        ("rows.64x64", torch.zeros(4), "rows.64x64.: found .* F32, expected .* I64"),
        ("latents.64x64", torch.zeros(4, 8, 8, 40), r"latents.64x64.: found \(4, 8, 8, 40\)"),
        ("latents.64x64", torch.zeros(4, 8, 0, 8), r"latents.64x64.: found \(4, 8, 0, 8\)"),
        ("latents.64x64", torch.zeros(4, 16, 8, 8), r"latents.64x64.: found \(4, 16, 8, 8\)"),
        ("latents.64x64", torch.zeros(4), r"latents.64x64.: found \(4,\)"),
        ("hidden", torch.zeros(5, 16), r"hidden.: found \(5, 16\)"),
        ("hidden", torch.zeros(0, 16, 64), r"hidden.: found \(0, 16, 64\)"),
        ("pooled", torch.zeros(5, 63), r"pooled.: found \(5, 63\)"),
        ("more", torch.zeros(1), r"more.: found \(1,\) F32, expected None"),
    ],
)
def test_a_shard_that_is_not_as_the_index_and_the_model_say(
    pipe: Any, model: Path, tmp_path: Path, name: str, tensor: torch.Tensor, said: str
) -> None:
    folder = whole(pipe, model, tmp_path)
    path = folder / "shard-00000.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    save_file(tensors | {name: tensor}, path)
    data = json.loads((folder / "cache.json").read_text())
    data["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "cache.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        opened(folder, model)


def test_hashes_of_all_shards_are_kept_at_once(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole(pipe, model, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "KEPT_FROM", 0)
    writes, write = list[Path](), hashes.write_text
    monkeypatch.setattr(hashes, "write_text", lambda path, text: writes.append(path) or write(path, text))  # type: ignore[func-returns-value]
    monkeypatch.setattr(hashes, "_known", {})
    opened(folder, model)
    assert len(list(folder.glob("*.safetensors"))) > 1 and len(writes) == 1
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "sha256_file", lambda path: pytest.fail(f"read {path} again"))
    opened(folder, model)
    assert len(writes) == 1


def test_pages_are_mapped_not_read(pipe: Any, model: Path, tmp_path: Path) -> None:
    folder = whole(pipe, model, tmp_path)
    pairs = opened(folder, model)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert str(folder / "shard-00000.safetensors") in maps.read_text()
    assert len(pairs) == 6
