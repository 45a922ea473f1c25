"""Links: a snapshot of any layout is the same model as a plain copy, and what leads out of it is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import strategies as st
from properties import holds
from tiny import tiny_pipeline

from edgeprune.artefact.resolve import read_config
from edgeprune.common.errors import InputError
from edgeprune.common.files import check_links, inside
from edgeprune.common.hub_cache import SHARED_MARKER
from edgeprune.residency.model_files import read_weight_map
from edgeprune.residency.weights import Weights
from edgeprune.stages.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
STORES = ("plain", "old", "new")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and the same in shards."""
    root = tmp_path_factory.mktemp("links")
    pipe = tiny_pipeline(root / "whole", num_layers=1)
    shutil.copytree(root / "whole", root / "shards")
    for part, size in (("transformer", "100KB"), ("text_encoder", "20KB"), ("vae", "20KB")):
        for path in (root / "shards" / part).glob("*.safetensors"):
            path.unlink()
        getattr(pipe, part).half().save_pretrained(root / "shards" / part, max_shard_size=size)
    return {name: root / name for name in ("whole", "shards")}


@pytest.fixture(scope="module")
def digests(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What identifies the plain copies."""
    out = tmp_path_factory.mktemp("digests")
    return {name: Workspace(out / name, str(folder)).weights_hash for name, folder in models.items()}


def cache(source: Path, root: Path, stores: list[str]) -> Path:
    """Make a hub's cache of a model and return the snapshot; its files are in these stores, in turn."""
    repository = root / "models--me--m"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / SHARED_MARKER).write_text("1\n")
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        at, store = snapshot / path.relative_to(source), stores[number % len(stores)]
        blob, shared = repository / "blobs" / f"{number:064x}", root / "blobs" / "ab" / f"{number:064x}"
        at.parent.mkdir(parents=True, exist_ok=True)
        real = {"plain": at, "old": blob, "new": shared}[store]
        real.parent.mkdir(exist_ok=True)
        os.link(path, real)
        if store == "new":
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        if store != "plain":
            at.symlink_to(os.path.relpath(blob, at.parent))
    return snapshot


LAYOUT: dict[str, Any] = {
    "model": st.sampled_from(["whole", "shards"]),
    "stores": st.lists(st.sampled_from(STORES), min_size=1, max_size=4),
    "given": st.sampled_from(["snapshot", "link to it", "repository on another disk", "relative"]),
}


def given_as(snapshot: Path, root: Path, how: str) -> Path:
    """Return the path by which the user names a snapshot."""
    if how == "link to it":
        (root / "mine").symlink_to(snapshot)
        return root / "mine"
    if how == "repository on another disk":
        repository, disk = snapshot.parents[1], root / "disk"
        disk.mkdir()
        repository.rename(disk / "m")
        (disk / "blobs").symlink_to(repository.parent / "blobs")
        repository.symlink_to(disk / "m")
    return Path(os.path.relpath(snapshot)) if how == "relative" else snapshot


@holds(st.fixed_dictionaries(LAYOUT), few=12)
def test_any_cache_is_the_model_of_a_plain_copy(
    case: dict[str, Any], place: Path, models: dict[str, Path], digests: dict[str, str]
) -> None:
    snapshot = cache(models[case["model"]], place / "cache", case["stores"])
    folder = given_as(snapshot, place, case["given"])
    ws = Workspace(place / "out", str(folder))
    assert ws.weights_hash == digests[case["model"]]
    for part in ("transformer", "text_encoder", "vae"):
        found, plain = Weights(folder / part), Weights(models[case["model"]] / part)
        assert found.shapes == plain.shapes
        name = min(found.shapes)
        assert found[name].equal(plain[name])


# Where a link leads, from the snapshot (S), its repository (R) or the cache (C); and whether that is inside it.
INSIDE = {"S/vae/config.json": True, "S/vae": True, "S/none": True, "R/blobs/none": True, "C/blobs/ab/none": True}
OUTSIDE = [
    *("/etc/hostname", "/", "S/..", "R", "R/refs/main", "C", "C/models--me--other/blobs/1", "C/x", "C/../private"),
    *(
        "R/snapshots/1/config.json",
        "R/blobs-of-another/1",
        "C/blobs/../x",
        "S/../../refs",
        "S/vae/../../x",
        "R/blobs/..",
    ),
    "R/blobs/leads-out",
]
TARGETS = INSIDE | dict.fromkeys(OUTSIDE, False)


@holds(
    st.fixed_dictionaries(
        LAYOUT
        | {
            "where": st.sampled_from(["", "vae", "new", "vae/a/b", "transformer", ".hidden"]),
            "name": st.sampled_from(["x", "config.json.bak", "notes.md", "é", "weights.safetensors", "-x"]),
            "target": st.sampled_from(list(TARGETS)),
            "steps": st.integers(0, 3),
            "relative": st.booleans(),
        }
    ),
    few=60,
)
def test_a_link_out_of_a_snapshot_is_refused_and_no_other(
    case: dict[str, Any], place: Path, models: dict[str, Path]
) -> None:
    snapshot = cache(models["whole"], place / "cache", case["stores"])
    repository, root = snapshot.parents[1], place / "cache"
    (repository / "blobs" / "leads-out").symlink_to("/etc/hostname")
    target = case["target"]
    for letter, folder in (("S", snapshot), ("R", repository), ("C", root)):
        if target == letter or target.startswith(f"{letter}/"):
            target = f"{folder}{target[1:]}"
    at = snapshot / case["where"]
    at.mkdir(parents=True, exist_ok=True)
    for step in range(case["steps"]):  # a chain of links, within the snapshot
        (at / f"step{step}").symlink_to(os.path.relpath(target, at) if case["relative"] else target)
        target = str(at / f"step{step}")
    (at / case["name"]).symlink_to(os.path.relpath(target, at) if case["relative"] else target)
    folder = given_as(snapshot, place, "link to it" if case["given"] == "link to it" else "snapshot")
    if TARGETS[case["target"]]:
        check_links(folder)
        read_config(folder)
    else:
        with pytest.raises(InputError, match="which leads out of the folder"):
            read_config(folder)


@holds(
    st.fixed_dictionaries(
        {
            "where": st.sampled_from(["", "vae", "new/deep"]),
            "target": st.sampled_from(
                ["../x", "/etc/hostname", "../../..", "{root}/artefact-2/x", "vae/config.json", "."]
            ),
            "cacheish": st.booleans(),
        }
    ),
    few=25,
)
def test_a_link_out_of_an_artefact_is_refused(case: dict[str, Any], place: Path, models: dict[str, Path]) -> None:
    """Also where its path looks like that of a cache, and a store is beside it."""
    folder = place / ("models--me--m/revisions/1" if case["cacheish"] else "artefact")
    shutil.copytree(models["whole"], folder, copy_function=os.link)
    (folder.parents[1] / "blobs").mkdir(exist_ok=True)
    at = folder / case["where"]
    at.mkdir(parents=True, exist_ok=True)
    target = case["target"].format(root=place)
    target = target if target.startswith("/") else os.path.relpath(folder / target, at)
    (at / "link").symlink_to(target)
    if os.path.realpath(at / "link").startswith(f"{os.path.realpath(folder)}/") or case["target"] == ".":
        read_config(folder)
    else:
        with pytest.raises(InputError, match="which leads out of the folder"):
            read_config(folder)


PIECES = [
    *("..", ".", "", "a", "vae", "é", "C:", "\0", "\u202e", "\u2024\u2024", "\ud800", "x" * 300, "x" * 5000, " ", "~"),
    *("model.safetensors", "link", "CON", "\x1b[31m", "%2e%2e", "-rf", "\n", "\uff0f", "e\u0301"),
]
NAMES = st.lists(
    st.tuples(st.sampled_from(PIECES), st.sampled_from(["/", "\\", "//", ""])), min_size=1, max_size=5
).map(lambda parts: "".join(piece + slash for piece, slash in parts))


@holds(st.one_of(NAMES, st.text(max_size=12)), few=150)
def test_a_name_in_an_index_stays_in_its_folder_or_is_refused(case: str, place: Path) -> None:
    folder = place / "model" / "transformer"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to("../..")
    (folder / "model.safetensors").write_bytes(b"")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in (case, f"{case}.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        windows = PureWindowsPath(name)
        try:
            assert read_weight_map(index) == {"a": name}
            assert os.path.basename(name) == name and name not in ("..", ".")
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        try:
            found = inside(folder, name, index)
            assert found.is_relative_to(folder.resolve()) and found == Path(os.path.realpath(folder / name))
            assert ".." not in windows.parts and not windows.drive and not windows.root
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert sorted(p.name for p in place.rglob("*")) == sorted(
        ["model", "transformer", "link", "model.safetensors", index.name]
    )
