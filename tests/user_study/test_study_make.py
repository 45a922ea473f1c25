"""The user study: a folder of a study from folders of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from studies import SCRIPT, image_folders

from edgeprune.common.errors import InputError
from edgeprune.user_study import design
from edgeprune.user_study.make import make


def test_a_study_keeps_pixels_and_nothing_else_of_a_file(tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in")
    note = PngInfo()
    note.add_text("model", "ours")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folders["ours"] / "000.png", pnginfo=note, icc_profile=b"ours")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(folders["ours"] / "001.webp", lossless=True)
    (folders["ours"] / "001.png").unlink()
    made = make(tmp_path / "study", folders, prompts=tmp_path / "in" / "prompts.txt", title="T", seed=3)
    assert design.read(tmp_path / "study") == made
    assert made.prompts[0] == SCRIPT and made.files == ("000", "001", "002", "003") and made.per_rater == 12
    for prompt, colour in ((0, (1, 2, 3)), (1, (7, 7, 7))):
        path = tmp_path / "study" / made.image(1, prompt)
        with Image.open(path) as image:
            assert image.format == "PNG" and image.info == {} and image.getpixel((0, 0)) == colour
    assert not list(tmp_path.glob("*.tmp"))


def test_prompts_of_an_imagefolder(tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in", prompts=2)
    lines = [{"file_name": "001.png", "text": "second"}, {"file_name": "000.png", "text": "first"}]
    (folders["original"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert make(tmp_path / "study", folders).prompts == ("first", "second")


def metadata(name: str, text: Any = "x") -> Any:
    return lambda root: (root / "prompts.jsonl").write_text(json.dumps({"file_name": name, "text": text}) + "\n")


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda root: (root / "ours" / "001.png").unlink(), {}, "ours: no image named 001; expected equal names"),
        (lambda root: (root / "original" / "001.png").unlink(), {}, "original: no image named 001"),
        (lambda root: Image.new("RGB", (9, 8)).save(root / "ours" / "001.png"), {}, "9x8"),
        (lambda root: (root / "ours" / "001.png").write_bytes(b"no"), {}, "001.png: not a readable image"),
        (lambda root: Image.new("L", (8, 8)).save(root / "ours" / "001.jpg"), {}, "one image per name"),
        (lambda root: shutil.rmtree(root / "ours"), {}, "ours: no such folder"),
        (lambda root: (root / "prompts.txt").write_text("one\n\n"), {}, "found 1 prompts, expected 4"),
        (lambda root: (root / "prompts.txt").write_bytes(b"\xff"), {}, "prompts.txt: not readable"),
        (metadata("../ours/000.png"), {"prompts": "prompts.jsonl"}, "prompts.jsonl:1: file_name: '../ours/000.png'"),
        (metadata("/etc/passwd"), {"prompts": "prompts.jsonl"}, "file_name: '/etc/passwd' leads out"),
        (metadata("000.png"), {"prompts": "prompts.jsonl"}, "no line for the image 001"),
        (metadata("000.png", 7), {"prompts": "prompts.jsonl"}, "text: found 7"),
        (lambda root: None, {"prompts": None}, "metadata.jsonl: no such file; give --prompts"),
        (lambda root: None, {"mode": "stars"}, "--mode: found 'stars', expected mos or pairs"),
        (lambda root: None, {"per_rater": 13}, "--per-rater: found 13, expected 1 to 12"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    spoil: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    folders = image_folders(root)
    spoil(root)
    options = {"prompts": "prompts.txt", **options}
    prompts = options.pop("prompts")
    with pytest.raises(InputError) as caught:
        make(tmp_path / "study", folders, prompts=root / prompts if prompts else None, **options)
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["..", "a/b", "/abs", "", "a b", "$x$", "x" * 41])
def test_names_of_variants_cannot_lead_anywhere(name: str, tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in")
    with pytest.raises(InputError, match="variant"):
        make(tmp_path / "study", {"original": folders["original"], name: folders["ours"]})


def test_a_study_is_written_within_its_folder(tmp_path: Path) -> None:
    """The folder may be a mount or a link, and nothing beside it is touched; what a killed run left is removed."""
    (tmp_path / "place").mkdir()
    variants = image_folders(tmp_path)
    (tmp_path / "disk" / ".unfinished" / "images").mkdir(parents=True)
    (tmp_path / "place" / "study").symlink_to(tmp_path / "disk")
    beside = []
    make(
        tmp_path / "place" / "study", variants, per_rater=1, prompts=tmp_path / "prompts.txt",
        progress=lambda *_: beside.extend(p.name for p in (tmp_path / "place").iterdir()),
    )  # fmt: skip
    assert set(beside) == {"study"} and (tmp_path / "place" / "study").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["images", "study.json"]
