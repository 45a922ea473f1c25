"""Data as links lay it out: a folder of links of the user's own, and data sets in huggingface_hub's cache."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import hub
import pytest
from PIL import Image

from edgeprune.common.errors import InputError
from edgeprune.data.imagefolder import read_samples
from edgeprune.data.sources import Entry, Pair, Skipped, layout_of, opened
from edgeprune.data.sources import folder as imagefolder
from edgeprune.user_study.make import make


def picture(colour: str = "red") -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def everything(given: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (name, text) of the usable entries, and the names of the skipped ones."""
    layout = layout_of(str(given))
    assert layout is not None
    found = [opened(e) if isinstance(e, Entry) else e for e in layout.read(str(given))]
    return [(f.name, f.text) for f in found if isinstance(f, Pair)], [f.name for f in found if isinstance(f, Skipped)]


def images(root: Path) -> Path:
    """A folder of two images."""
    root.mkdir()
    for name, colour in (("1", "red"), ("2", "blue")):
        (root / f"{name}.png").write_bytes(picture(colour))
    return root


def metadata(root: Path, *names: str) -> Path:
    """An imagefolder's metadata.jsonl, in which every image has a caption."""
    root.mkdir(exist_ok=True)
    lines = (json.dumps({"file_name": name, "text": "a square"}) for name in names)
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_links_in_the_users_own_folder_are_followed(tmp_path: Path) -> None:
    there = images(tmp_path / "there")
    one = metadata(tmp_path / "one", "1.png", "2.png")  # each image a link
    for path in there.iterdir():
        (one / path.name).symlink_to(os.path.relpath(path, one))
    whole = metadata(tmp_path / "whole", "images/1.png", "./images/2.png")  # a linked folder
    (whole / "images").symlink_to(there)
    listed = tmp_path / "listed"  # metadata of one disk, images of another
    listed.mkdir()
    (listed / "metadata.jsonl").symlink_to(whole / "metadata.jsonl")
    (listed / "images").symlink_to(there)
    for folder in (one, whole, listed):
        pairs, skipped = everything(folder)
        assert [text for _, text in pairs] == ["a square"] * 2 and skipped == []
        assert len(read_samples(folder)) == 2
    pop = tmp_path / "pop"
    pop.mkdir()
    (pop / "1.png").symlink_to(there / "1.png")
    (pop / "0.json").write_text(json.dumps({"1": {"filename": "1.png", "cogvlm_caption": "a square"}}))
    assert everything(pop) == ([("1.png", "a square")], [])


def test_a_link_to_nothing_is_skipped_like_a_missing_file(tmp_path: Path) -> None:
    root = metadata(tmp_path / "root", "gone.png", "loop.png")
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "loop.png").symlink_to("loop.png")
    assert everything(root) == ([], ["gone.png", "loop.png"])


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/a.png", "..\\a.png", "C:\\a.png", "\\\\host\\a.png"])
def test_names_are_checked_as_text_by_the_rules_of_every_system(name: str, tmp_path: Path) -> None:
    root = metadata(tmp_path / "root", name)
    with pytest.raises(InputError, match="metadata.jsonl:1: file_name: .* leads out of the folder"):
        everything(root)
    with pytest.raises(InputError, match="metadata.jsonl:1: file_name: .* leads out of the folder"):
        read_samples(root)


def test_a_new_image_behind_a_link_changes_the_identity(tmp_path: Path) -> None:
    there = images(tmp_path / "there")
    root = metadata(tmp_path / "root", "images/1.png")
    (root / "images").symlink_to(there)
    (there / "back").symlink_to(root)  # a circle ends
    before = imagefolder.identity(str(root))
    assert imagefolder.identity(str(root)) == before
    (there / "3.png").write_bytes(picture())
    assert imagefolder.identity(str(root)) != before


@pytest.mark.parametrize("shared", [False, True], ids=["old", "new"])
def test_data_sets_in_a_hub_cache(shared: bool, tmp_path: Path) -> None:
    made = {name: tmp_path / name for name in ("plain", "tars", "pop")}
    metadata(made["plain"], "images/1.png", "images/2.png")
    images(made["plain"] / "images")
    made["tars"].mkdir()
    with tarfile.open(made["tars"] / "0.tar", "w") as archive:
        (tmp_path / "text").write_text("a square")
        for path in sorted((made["plain"] / "images").iterdir()):
            archive.add(path, path.name)
            archive.add(tmp_path / "text", f"{path.stem}.txt")
    images(made["pop"])
    entries = {n: {"filename": f"{n}.png", "cogvlm_caption": "a square"} for n in ("1", "2")}
    (made["pop"] / "0.json").write_text(json.dumps(entries))
    for name, folder in made.items():
        snapshot = hub.cached(folder, tmp_path / f"hub-{name}", shared=shared, repository=f"datasets--me--{name}")
        pairs, skipped = everything(snapshot)
        assert [text for _, text in pairs] == ["a square"] * 2 and skipped == []
        layout = layout_of(str(snapshot))
        assert layout and layout.identity(str(snapshot)) == layout.identity(str(snapshot))


def test_a_study_of_linked_images_holds_their_pixels(tmp_path: Path) -> None:
    there = images(tmp_path / "there")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in there.iterdir():
        (linked / path.name).symlink_to(path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    study = make(tmp_path / "study", {"original": there, "ours": linked}, prompts=tmp_path / "prompts.txt", per_rater=2)
    copy = tmp_path / "study" / study.image(1, 0)
    assert copy.is_file() and not copy.is_symlink()
