"""Layouts of training images: what each one reads, skips (with a reason) and refuses."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgeprune.common import images as common_images
from edgeprune.common.errors import InputError
from edgeprune.data.imagefolder import read_samples
from edgeprune.data.sources import Entry, Pair, Skipped, caption_of, layout_of, opened
from edgeprune.metrics import psnr, scoring
from edgeprune.user_study.make import make


def picture(colour: str = "red", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def everything(given: Path | str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (name, text) of the usable entries, and the names of the skipped ones."""
    layout = layout_of(str(given))
    assert layout is not None
    entries = list(layout.read(str(given)))
    assert layout.count(str(given)) in (len(entries), None)
    found = [opened(e) if isinstance(e, Entry) else e for e in entries]
    pairs = [(f.name, f.text) for f in found if isinstance(f, Pair)]
    assert all(f.image.mode == "RGB" for f in found if isinstance(f, Pair))
    return pairs, [f.name for f in found if isinstance(f, Skipped)]


def imagefolder(root: Path) -> Path:
    root.mkdir()
    (root / "a.png").write_bytes(picture())
    (root / "b.png").write_bytes(b"no image")
    entries: list[Any] = [
        {"file_name": "a.png", "text": " a red box "},
        {"file_name": "b.png", "text": "broken"},
        {"file_name": "missing.png", "text": "nothing"},
        {"file_name": "a.png", "text": "  "},
        {"file_name": "a.png", "caption": "by another name"},
    ]
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in entries))
    return root


def shard(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_imagefolder(tmp_path: Path) -> None:
    pairs, skipped = everything(imagefolder(tmp_path / "images"))
    assert pairs == [("a.png", "a red box"), ("a.png", "by another name")]
    assert skipped == ["b.png", "missing.png", "a.png"]


@pytest.mark.parametrize("line", ['{"file_name": "../a.png", "text": "x"}', '{"file_name": "/a.png", "text": "x"}'])
def test_a_path_out_of_the_folder_is_refused(line: str, tmp_path: Path) -> None:
    root = imagefolder(tmp_path / "images")
    (root / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match="metadata.jsonl:1: file_name: .* leads out of the folder"):
        everything(root)
    (root / "metadata.jsonl").write_text("[1]")
    with pytest.raises(InputError, match="metadata.jsonl:1: expected file_name and text"):
        everything(root)


def test_tar_shards(tmp_path: Path) -> None:
    shard(
        tmp_path / "tars" / "1.tar",
        b1__png=picture(),
        b1__txt=b"one",
        b2__txt=b"no image",
        b3__jpg=b"bad",
        b3__txt=b"x",
    )
    json_ = json.dumps({"cogvlm_caption": "long", "llava_caption": "other"}).encode()
    shard(tmp_path / "tars" / "0.tar", a1__json=json_, a1__png=picture("blue"), a2__png=picture(), a2__json=b"{")
    pairs, skipped = everything(tmp_path / "tars")
    assert pairs == [("0.tar/a1", "long"), ("1.tar/b1", "one")]
    assert skipped == ["0.tar/a2", "1.tar/b2", "1.tar/b3"]
    assert everything(tmp_path / "tars" / "1.tar")[0] == [("1.tar/b1", "one")]
    whole = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError, match=r"1\.tar: not a complete tar archive"):
        everything(tmp_path / "tars")


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../out.png", "/abs.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture())
            archive.addfile(info, io.BytesIO(picture()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert everything(tmp_path / "evil.tar") == ([], ["evil.tar/../out", "evil.tar//abs"])
    assert not (tmp_path.parent / "out.png").exists()


def test_yepop(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.png").write_bytes(picture())
    entries = {"7": {"filename": "images/7.png", "cogvlm_caption": "a box"}, "8": {"filename": "images/8.png"}, "9": []}
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert everything(tmp_path) == ([("images/7.png", "a box")], ["images/8.png", "list.json: 9"])
    (tmp_path / "list.json").write_text(json.dumps({"1": {"filename": "../../x.png"}}))
    with pytest.raises(InputError, match=r"list.json: 1: filename: found '../../x.png', which leads out of the folder"):
        everything(tmp_path)


def test_huge_images_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_images, "MAX_PIXELS", 50)
    found = opened(Entry("x", picture(), "text"))
    assert found == Skipped("x", "found 12 x 8, expected at most 50 pixels")


class FakeRows(list[dict[str, Any]]):
    """A stand-in for the rows that `datasets` returns."""

    features: dict[str, Any]

    def cast_column(self, name: str, kind: Any) -> "FakeRows":
        assert name == "image" and not kind.decode
        return self


def test_datasets_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeImage:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    rows = FakeRows(
        [{"image": {"bytes": b, "path": None}, "text": t} for b, t in ((picture(), "a"), (picture(), None))]
    )
    rows += [{"image": {"bytes": b"bad", "path": None}, "text": "b"}, {"image": None, "text": "c"}]
    rows.features = {"text": None, "image": FakeImage()}

    class Fake:
        Image = FakeImage

        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> FakeRows:
            assert (name, split, streaming) == ("me/mine", "test", True)
            return rows

    monkeypatch.setitem(__import__("sys").modules, "datasets", Fake)
    with pytest.warns(UserWarning, match="captions are taken from the column text"):
        assert everything("datasets:me/mine:test") == ([("row 0", "a")], ["row 1", "row 2", "row 3"])
    rows.features = {"text": None}
    with pytest.raises(InputError, match="datasets:me/mine:test: found no image among its columns: text"):
        everything("datasets:me/mine:test")


def test_what_has_no_caption_says_so() -> None:
    assert opened(Entry("a.png", b"", caption_of({"text": ""}))) == Skipped(
        "a.png", "caption: found none, expected text"
    )


def test_data_scores_and_studies_open_images_alike(tmp_path: Path) -> None:
    """A picture that is stored lying down stands everywhere, and has the size of its upright original."""
    upright = Image.new("RGB", (8, 12), "blue")
    upright.paste((255, 0, 0), (0, 0, 8, 6))
    exif = Image.Exif()
    exif[0x112] = 6
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    for name, image, how in (("one", upright, {}), ("two", lying, {"exif": exif})):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.png", **how)
        (tmp_path / name / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "red above blue"}')
    pair = opened(Entry("1", tmp_path / "two" / "1.png", "text"))
    assert isinstance(pair, Pair)
    study = make(tmp_path / "study", {"one": tmp_path / "one", "two": tmp_path / "two"}, per_rater=2)
    samples = {name: read_samples(tmp_path / name) for name in ("one", "two")}
    (found,) = scoring.score(samples["two"], ["psnr"], against=samples["one"])
    for image in (pair.image, Image.open(tmp_path / "study" / study.image(1, 0))):
        assert image.tobytes() == upright.tobytes()
    assert found.values == [psnr.MOST]
