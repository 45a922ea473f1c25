"""Outputs: a path is refused before any work exactly if it cannot be written, and nothing beside it changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from properties import holds
from tiny import tiny_pipeline

from edgeprune.api.folders import check_out, open_folder
from edgeprune.common.errors import EdgepruneError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # what is guessed of the tiny model
STATES = ["folder", "missing", "file", "link", "dangling", "loop", "link to file", "read-only", "chain", "up"]
CASE = {
    "levels": st.lists(st.sampled_from(STATES), min_size=1, max_size=4),
    "names": st.lists(st.sampled_from(["a", "é", "-o", "a b", ".x", "x" * 200]), min_size=4, max_size=4),
    "content": st.sampled_from([None, "empty", "foreign", "begun"]),
    "relative": st.booleans(),
}


def made(case: dict[str, Any], root: Path) -> Path:
    """Make a path, component by component, each in one of STATES; what links lead to is in `elsewhere`."""
    elsewhere, path = root / "elsewhere", root / "here"
    path.mkdir()
    elsewhere.mkdir()
    for number, (state, name) in enumerate(zip(case["levels"], case["names"], strict=False)):
        if state == "up":
            path /= ".."
            continue
        path = path / name
        if os.path.lexists(path) or not path.parent.is_dir():
            continue
        target = elsewhere / str(number)
        match state:
            case "folder" | "read-only":
                path.mkdir()
                path.chmod(0o555 if state == "read-only" else 0o755)
            case "file":
                path.write_text("mine")
            case "loop":
                path.symlink_to(name)
            case "link" | "chain":
                target.mkdir()
                (elsewhere / f"{number}c").symlink_to(target)
                path.symlink_to(target if state == "link" else elsewhere / f"{number}c")
            case "dangling":
                path.symlink_to(target)
            case "link to file":
                target.write_text("mine")
                path.symlink_to(target)
    return path


def listed(root: Path) -> dict[str, Any]:
    """Return every path below a folder, with what a link leads to or a file holds."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in root.rglob("*")
    }  # fmt: skip


def allowed(path: str | os.PathLike[str], mode: int) -> bool:
    """Answer as os.access does for a user who is not root, of whom permissions are asked."""
    bits = os.stat(path).st_mode >> 6
    return all(bits & bit for flag, bit in ((os.W_OK, 2), (os.X_OK, 1), (os.R_OK, 4)) if mode & flag)


def can_be_written(path: Path) -> bool:
    """Return whether a user could create this folder and a file in it, by trying on what is there."""
    new = list[Path]()
    try:
        for place in reversed((path, *path.parents)):
            if not place.exists():
                if not allowed(place.parent, os.W_OK | os.X_OK):
                    return False
                place.mkdir()
                new.append(place)
        return path.is_dir() and allowed(path, os.W_OK | os.X_OK)
    except OSError:
        return False
    finally:
        for place in reversed(new):
            place.rmdir()


@holds(st.fixed_dictionaries(CASE), few=150)
def test_a_path_is_refused_if_and_only_if_it_cannot_be_written(case: dict[str, Any], place: Path) -> None:
    path = made(case, place)
    given = Path(os.path.relpath(path)) if case["relative"] and "up" not in case["levels"] else path
    before = listed(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda where, mode: allowed(where, mode))
        try:
            check_out(given)
            refused = False
        except InputError as error:
            assert str(error).startswith(f"-o {given}: ") and "\n" not in str(error)
            refused = True
    assert listed(place) == before
    assert refused != can_be_written(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    tiny_pipeline(folder := tmp_path_factory.mktemp("outputs") / "model", num_layers=1)
    return folder


@holds(
    st.fixed_dictionaries(
        CASE | {"inside": st.sampled_from([None, None, "", "x", "vae", "vae/x", "transformer", "../model"])}
    ),
    few=30,
)
def test_a_folder_is_begun_within_or_refused(case: dict[str, Any], place: Path, model: Path) -> None:
    """`inside`: the output is the model's own folder, or in it."""
    source = Path(shutil.copytree(model, place / "model", copy_function=os.link))
    path = made(case, place) if case["inside"] is None else source / case["inside"]
    if case["inside"] is None and case["content"] and path.is_dir() and allowed(path, os.W_OK):
        if case["content"] == "begun":
            open_folder(path, source, begin=True)
        elif case["content"] == "foreign":
            (path / "thesis.txt").write_text("mine")
    before, into = listed(place), os.path.realpath(path)
    foreign = path.is_dir() and any(path.iterdir()) and not (path / "edgeprune.json").is_file()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "access", lambda where, mode: allowed(where, mode))
            open_folder(path, source, begin=True)
    except EdgepruneError as error:
        assert "\n" not in str(error)
        assert listed(place) == before
        return
    assert not foreign, "it begins in a folder of other things"
    after = listed(place)
    changed = {name for name in before.keys() | after.keys() if before.get(name, "") != after.get(name, "")}
    parents = {str(parent) for parent in Path(into).parents}
    real = {os.path.realpath(name) for name in changed}
    assert all(name == into or name.startswith(f"{into}/") or name in parents - set(before) for name in real)
    assert (path / "edgeprune.json").is_file()
