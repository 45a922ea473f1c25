"""Data: however pairs of images and captions are laid out, the same pairs are read, and what is skipped is counted."""

from __future__ import annotations

import collections
import csv
import importlib.util
import io
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image
from properties import holds

from edgeprune.data.encode import skip_report
from edgeprune.data.imagefolder import read_samples
from edgeprune.data.sources import Entry, Pair, Skipped, layout_of, opened

pytestmark = pytest.mark.filterwarnings("ignore")
TABLES = ["jsonl", "csv", *(["parquet"] if importlib.util.find_spec("pyarrow") else [])]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"]
BAD = ["damaged", "no caption", "no text", "no image"]
"""Entries that cannot be used."""
# Of names: neither a separator nor what systems refuse; a leading dot hides a file.
NAME = st.text(st.sampled_from("ab1-_ .é日XY()[]%#'\u0301\u200b"), min_size=1, max_size=8).filter(
    lambda name: name[0] not in ". " and not name.endswith(" ")
)
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff", codec="utf-8"), min_size=1, max_size=20
).filter(lambda text: bool(text.strip()))
CAPTION = st.one_of(
    TEXT, st.sampled_from(['a "quoted", text', "two\nlines", "a\u2028b\x85c", "N/A", "7", "null", "'=1+1"])
)
CASE = {
    "layout": st.sampled_from(["folder", "two folders", "nested", "tar", "tar.gz", "tars", "yepop", *TABLES]),
    "pairs": st.lists(st.tuples(NAME, CAPTION), min_size=1, max_size=6, unique_by=lambda pair: pair[0].casefold()),
    "bad": st.lists(st.sampled_from(BAD), max_size=3),
    "encoding": st.sampled_from(ENCODINGS), "train": st.booleans(), "upper": st.booleans(),
    "ending": st.sampled_from([".png", ".jpg", ".webp", ".bmp"]), "text": st.sampled_from([".txt", ".caption"]),
    "column": st.sampled_from(["text", "caption", "prompt", "Description", "TEXT"]), "order": st.integers(0, 999),
    "noise": st.lists(
        st.sampled_from(["._1.png", "notes.md", "__MACOSX/1.png", ".DS_Store", ".cache/x.txt", "Thumbs.db"]), max_size=3
    ),
}  # fmt: skip


def picture(number: int, ending: str) -> bytes:
    """Return an image whose colour says which it is."""
    kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}[ending]
    Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def encoded(text: str, encoding: str) -> bytes:
    """Return text as editors write it: UTF-16 begins with its mark."""
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    return (mark + text).encode(encoding)


class Laid:
    """The files of a case, in the order in which they are written, and how many entries cannot be used."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.files, self.rows, self.skipped = case, dict[str, bytes](), list[tuple[str, object]](), 0
        end = case["ending"].upper() if case["upper"] else case["ending"]
        for number, (name, caption) in enumerate(case["pairs"]):
            self._add(number, name, picture(number, case["ending"]), caption, end)
        for number, kind in enumerate(case["bad"], 6):
            name, image = f"0bad{number}", picture(0, case["ending"])
            content = {"damaged": image[:20], "no image": None}.get(kind, image)
            caption = {"no caption": None, "no text": " \n "}.get(kind, "a caption")
            self._add(number, name, content, caption, end)
            self.skipped += 1

    def _add(self, number: int, name: str, image: bytes | None, caption: str | None, end: str) -> None:
        layout = self.case["layout"]
        folder = f"{number}_x/" if layout == "nested" else ""
        images, texts = ("img/", "txt/") if layout == "two folders" else (folder, folder)
        if image is not None:
            self.files[f"{images}{name}{end}"] = image
        if layout in (*TABLES, "yepop"):
            self.rows.append((f"{images}{name}{end}", caption))
        elif caption is not None:
            self.files[f"{texts}{name}{self.case['text']}"] = encoded(caption, self.case["encoding"])

    def write(self, place: Path) -> str:
        """Write them and return the value of --data."""
        case, layout = self.case, self.case["layout"]
        shuffle = random.Random(case["order"]).shuffle
        shuffle(self.rows)
        root = place / "data"
        inner = root / "train" if case["train"] and layout != "yepop" and not layout.startswith("tar") else root
        files = list((self.files | dict.fromkeys(case["noise"], b"\0\5")).items())
        shuffle(files)
        if layout.startswith("tar"):
            root.mkdir()
            return self._archive(root, files, layout)
        for name, content in files:
            (inner / name).parent.mkdir(parents=True, exist_ok=True)
            (inner / name).write_bytes(content)
        if self.rows:
            self._table(inner)
        return str(root)

    def _archive(self, root: Path, files: list[tuple[str, bytes]], layout: str) -> str:
        mode: Any = "w:gz" if layout == "tar.gz" else "w"
        stems = {name: re.sub(r"\.[^.]*$", "", name) for name, _ in files}
        shards = [files]
        if layout == "tars":  # what belongs together stays in one archive
            shards = [[f for f in files if (sum(map(ord, stems[f[0]])) % 2) == k] for k in (0, 1)]
        for number, some in enumerate(shards):
            with tarfile.open(
                root / f"{number}.{'TAR' if self.case['upper'] else 'tar'}{mode[1:].replace(':', '.')}", mode
            ) as archive:
                for name, content in some:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return str(root)

    def _table(self, root: Path) -> None:
        case, column = self.case, self.case["column"]
        rows = [{"file_name": name, column: caption, "width": 16} for name, caption in self.rows]
        if case["layout"] == "yepop":
            entries = {str(i): {"filename": row.pop("file_name")} | row for i, row in enumerate(rows)}
            (root / "a.json").write_bytes(encoded(json.dumps(entries), case["encoding"]))
        elif case["layout"] == "jsonl":
            raw = "".join(json.dumps(row, ensure_ascii=case["upper"]) + "\n" for row in rows)
            (root / "metadata.jsonl").write_bytes(encoded(raw, case["encoding"]))
        elif case["layout"] == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\r\n" if case["upper"] else "\n")
            writer.writeheader()
            writer.writerows(rows)
            (root / "metadata.csv").write_bytes(encoded(text.getvalue(), case["encoding"]))
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "metadata.parquet")


@holds(st.fixed_dictionaries(CASE), few=150)
def test_the_same_pairs_are_read(case: dict[str, Any], place: Path) -> None:
    laid = Laid(case)
    given = laid.write(place)
    layout = layout_of(given)
    assert layout is not None
    items = list(layout.read(given))
    assert layout.count(given) in (len(items), None) and items == list(layout.read(given))
    found = [opened(item) if isinstance(item, Entry) else item for item in items]
    pairs = [(round(f.image.getpixel((0, 0))[0] / 40), f.text) for f in found if isinstance(f, Pair)]  # type: ignore[index]
    wanted = [(number, caption.strip()) for number, (_, caption) in enumerate(case["pairs"])]
    assert collections.Counter(pairs) == collections.Counter(wanted)
    skipped = [f for f in found if isinstance(f, Skipped)]
    assert len(skipped) == laid.skipped and all("0bad" in s.name and s.why for s in skipped)
    (place / "skipped.json").write_text(json.dumps({"used": len(pairs), "skipped": [[s.name, s.why] for s in skipped]}))
    assert skip_report(place).startswith(f"{laid.skipped} of {len(wanted) + laid.skipped} skipped")
    if (
        case["layout"] == "jsonl"
        and not case["train"]
        and case["column"] in ("text", "prompt")
        and "no caption" not in case["bad"]
    ):
        listed = [(s.path.name, s.text) for s in read_samples(Path(given))]  # what score and studies read
        assert sorted(listed) == sorted((name, str(caption)) for name, caption in laid.rows)
