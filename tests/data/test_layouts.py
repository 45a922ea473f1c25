"""Data as trainers have it: which caption belongs to which image, in whatever order, encoding and naming."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgeprune.common.errors import InputError
from edgeprune.data import sources
from edgeprune.data.encode import skip_report
from edgeprune.data.grouping import grouped
from edgeprune.data.imagefolder import is_images, read_samples
from edgeprune.data.settings import check_source
from edgeprune.data.sources import Entry, Pair, Skipped, caption_of, layout_of, opened

TEXTS = (".json", ".txt", ".caption")


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def laid(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def packed(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def everything(given: Path | str) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Return colour and text of the usable entries, and the skipped ones."""
    layout = layout_of(str(given))
    assert layout is not None
    entries = list(layout.read(str(given)))
    assert layout.count(str(given)) in (len(entries), None)
    found = [opened(e) if isinstance(e, Entry) else e for e in entries]
    colours = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    pairs = [(colours[f.image.getpixel((0, 0))], f.text) for f in found if isinstance(f, Pair)]  # type: ignore[index]
    return pairs, [f for f in found if isinstance(f, Skipped)]


R, B = picture("red"), picture("blue")
PAIRS = [("red", "a red square"), ("blue", "a blue square")]
TR, TB = b"a red square\n", b"a blue square\n"
WAYS: dict[str, dict[str, bytes]] = {
    "sorted": {"1.png": R, "1.txt": TR, "2.png": B, "2.txt": TB},
    "unsorted": {"1.png": R, "2.png": B, "2.txt": TB, "1.txt": TR},
    "captions first": {"1.txt": TR, "2.txt": TB, "1.png": R, "2.png": B},
    "webdataset's dots": {"1.input.png": R, "1.outputs.txt": TR, "2.input.png": B, "2.outputs.txt": TB},
    "dots in names": {"img.v2.1.png": R, "img.v2.1.txt": TR, "img.v2.2.png": B, "img.v2.2.txt": TB},
    "upper case": {"1.PNG": R, "1.TXT": TR, "2.Png": B, "2.Txt": TB},
    "macOS": {"._1.png": b"\0\5", "1.png": R, "._1.txt": b"\0\5", "1.txt": TR, "2.png": B, "2.txt": TB,
              "__MACOSX/2.png": b"\0"},
    "masks": {"1.png": R, "1.seg.png": B, "1.txt": TR, "2.png": B, "2.seg.png": R, "2.txt": TB},
    "two folders": {"img/1.png": R, "img/2.png": B, "txt/1.txt": TR, "txt/2.txt": TB},
    "captions": {"1.png": R, "1.caption": TR, "2.png": B, "2.caption": TB},
    "nested": {"1_red/1.png": R, "1_red/1.txt": TR, "2_blue/1.png": B, "2_blue/1.txt": TB},
    "train": {"train/1.png": R, "train/1.txt": TR, "train/2.png": B, "train/2.txt": TB},
    "marks": {"1.png": R, "1.txt": TR.decode().encode("utf-8-sig"), "2.png": B,
              "2.txt": TB.decode().encode("utf-16")},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_same_pairs_in_a_folder_and_in_an_archive(way: str, tmp_path: Path) -> None:
    for given in (
        laid(tmp_path / "folder", WAYS[way]),
        packed(tmp_path / "a.tar", WAYS[way]),
        packed(tmp_path / "B.TAR.GZ", WAYS[way], "w:gz"),
    ):
        assert everything(given) == (PAIRS, []), given


def test_what_has_no_partner_is_a_reason(tmp_path: Path) -> None:
    files = {"img.v2.1.png": R, "img.v2.1.txt": TR, "img.v2.2.png": B, "img.v2.3.txt": TB, "4.png": B, "4.txt": b"\xe9"}
    for given in (laid(tmp_path / "folder", files), packed(tmp_path / "a.tar", files)):
        pairs, skipped = everything(given)
        assert pairs == PAIRS[:1]
        assert [s.why.partition("(")[0] for s in skipped if "img.v2" in s.name] == [
            "caption: found none, expected text",
            "no image beside it",
        ]
        assert [s.why for s in skipped if "4" in s.name and "not readable as text" in s.why]


def test_json_beside_an_image(tmp_path: Path) -> None:
    files = {"1.png": R, "1.json": b'{"caption": "a red square"}', "1.metadata.json": b'{"w": 64}'}
    files |= {"2.png": B, "2.json": '{"prompt": "a blue square"}'.encode("utf-16")}
    assert everything(packed(tmp_path / "a.tar", files)) == (PAIRS, [])
    assert [g.name for g in grouped(["b.png", "a/1.x.png", "a/1.y.txt"], TEXTS)] == ["b", "a/1.x"]


def test_tables(tmp_path: Path) -> None:
    table = 'file_name,text\n1.png,a red square\n2.png,"a blue square"\n1.png,\n2.png,"a ""blue""\nsquare"\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        root = laid(tmp_path / encoding, {"1.png": R, "2.png": B, "metadata.csv": table.encode(encoding)})
        pairs, skipped = everything(root)
        assert pairs == [*PAIRS, ("blue", 'a "blue"\nsquare')] and len(skipped) == 1
    lines = "".join(json.dumps({"file_name": n, "text": t}) + "\r\n" for n, t in (("1.png", "a red\u2028 square"),))
    root = laid(
        tmp_path / "sub", {"train/1.png": R, "train/metadata.jsonl": lines.replace("\\u2028", "\u2028").encode()}
    )
    assert everything(root) == ([("red", "a red\u2028 square")], [])
    laid(tmp_path / "none", {"1.png": R, "metadata.csv": b"image;text\n1.png;a\n"})
    with pytest.raises(InputError, match=r"metadata.csv:2: expected file_name and text .found image;text."):
        everything(tmp_path / "none")
    laid(tmp_path / "latin", {"1.png": R, "metadata.csv": b"file_name,text\n1.png,caf\xe9\n"})
    with pytest.raises(InputError, match=r"metadata.csv: not readable"):
        everything(tmp_path / "latin")


def test_parquet(tmp_path: Path) -> None:
    root = laid(tmp_path / "root", {"1.png": R, "2.png": B, "metadata.parquet": b"PAR1"})
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        from edgeprune.common.errors import MissingExtraError

        with pytest.raises(MissingExtraError, match="pyarrow"):
            everything(root)
        return
    rows = {"file_name": ["1.png", "2.png"], "text": [text for _, text in PAIRS]}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "metadata.parquet")
    assert everything(root) == (PAIRS, [])


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ({"text": ["", None, "second", "third"]}, "second"),
        ({"text": float("nan"), "caption": "a"}, "a"),
        ({"text": 7, "prompt": "b"}, "b"),
        ({"Description": "c"}, "c"),
        ({"TEXT": "d", "txt": "e"}, "d"),
        ({"captions": [{"raw": 1}, "f"]}, "f"),
        ({"text": 7}, 7),
        ({"other": "x"}, None),
    ],
)
def test_the_caption_is_the_first_usable_text(row: dict[str, Any], caption: object) -> None:
    assert caption_of(row) == caption


def test_nothing_is_loaded_before_a_first_row_was_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = laid(tmp_path / "root", {f"{n}.png": b"bad" for n in range(9)} | {f"{n}.txt": TR for n in range(9)})
    with pytest.raises(InputError, match=r"no image with a caption that can be used: 0.png: not a readable image"):
        check_source(str(root))
    laid(root, {"8.png": R})
    check_source(str(root))
    monkeypatch.setattr(sources, "MOST_UNUSABLE", 5)
    with pytest.raises(InputError, match="no image with a caption that can be used"):
        check_source(str(root))


def test_a_table_means_its_folder(tmp_path: Path) -> None:
    root = laid(tmp_path, {"1.png": R, "metadata.jsonl": b'{"file_name": "1.png", "text": "a"}'})
    with pytest.raises(InputError, match=f"found the table of an imagefolder, expected the folder: {root}"):
        check_source(str(root / "metadata.jsonl"))


def test_two_files_of_yepop_of_which_one_is_damaged(tmp_path: Path) -> None:
    entries = {"1": {"filename": "1.png", "cogvlm_caption": "a red square"}}
    laid(tmp_path, {"1.png": R, "a.json": b"{", "b.JSON": json.dumps(entries).encode("utf-8-sig"), "._c.json": b"\0"})
    assert everything(tmp_path) == (PAIRS[:1], [Skipped("a.json", "not readable as a JSON object")])


def test_the_most_frequent_reasons(tmp_path: Path) -> None:
    reasons = (
        ["found 9 x 9, expected 5"] * 1 + ["found 12 x 8, expected 5"] * 2 + ["caption: found 'a', expected text"] * 2
    )
    reasons += ["caption: found 'b c', expected text"] * 2 + ["x", "x", "y"]
    (tmp_path / "skipped.json").write_text(json.dumps({"used": 1990, "skipped": [["n", why] for why in reasons]}))
    assert skip_report(tmp_path).startswith(
        "10 of 2,000 skipped: 4 caption: found …, expected text; 3 found … x …, expected …; 2 x (listed in "
    )
    (tmp_path / "skipped.json").write_text(json.dumps({"used": 3, "skipped": []}))
    assert skip_report(tmp_path) == "0 of 3 skipped"


def test_columns_of_a_dataset_are_found_and_said() -> None:
    from edgeprune.data.sources import hub

    class Text:
        dtype = "string"

    for names, column in ((["image", "description"], "description"), (["image", "legend"], "legend")):
        with pytest.warns(UserWarning, match=f"captions are taken from the column {column}"):
            assert hub._captions("datasets:x", dict.fromkeys(names, Text()), "image") == column
    with pytest.raises(InputError, match="found no captions among its columns: one, two; expected text, caption"):
        hub._captions("datasets:x", dict.fromkeys(["image", "one", "two"], Text()), "image")
    with pytest.warns(UserWarning, match="captions are taken from the column json"):
        assert hub._captions("datasets:x", {"jpg": None, "json": {}}, "jpg") == "json"


def test_genevals_own_layout_and_both_names_of_prompts(tmp_path: Path) -> None:
    files = {}
    for number, text in enumerate(("a photo of a bench", "a photo of two clocks")):
        about = {"tag": "single_object", "include": [], "prompt": text}
        files[f"0000{number}/metadata.jsonl"] = json.dumps(about).encode() + b"\n"
        files |= {f"0000{number}/samples/000{n}.png": R for n in (1, 0)}
        files[f"0000{number}/grid.png"] = B
    root = laid(tmp_path / "geneval", files)
    assert is_images(root)
    found = [(s.path.relative_to(root).as_posix(), s.text) for s in read_samples(root)]
    assert found == [
        ("00000/samples/0000.png", "a photo of a bench"),
        ("00000/samples/0001.png", "a photo of a bench"),
        ("00001/samples/0000.png", "a photo of two clocks"),
        ("00001/samples/0001.png", "a photo of two clocks"),
    ]
    lines = b'{"file_name": "1.png", "prompt": "a"}\n{"file_name": "1.png", "text": "b", "prompt": "c"}\n'
    assert [s.text for s in read_samples(laid(tmp_path / "plain", {"metadata.jsonl": lines}))] == ["a", "b"]
    assert not is_images(laid(tmp_path / "model", {"transformer/config.json": b"{}"}))
