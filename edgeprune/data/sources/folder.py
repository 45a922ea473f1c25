"""An imagefolder as `datasets` reads it: images, and a table with `file_name` and a caption per line.

The table is `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, in the folder itself or in its subfolder `train/`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.files import files_digest, named
from edgeprune.common.texts import read_lines
from edgeprune.data.imagefolder import TABLES
from edgeprune.data.sources import Entry, Skipped, caption_of

STREAMED = False
_NAME = "file_name"


def table_of(folder: Path) -> Path | None:
    """Return the table of an imagefolder, or None."""
    places = (place / name for place in (folder, folder / "train") for name in TABLES)
    return next((path for path in places if path.is_file()), None)


def fits(given: str) -> bool:
    """Return whether this is a folder with such a table."""
    return table_of(Path(given)) is not None


def identity(given: str) -> str:
    """Return a digest of the name, size and modification time of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Count the lines; no image is opened."""
    return sum(1 for _ in read(given))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield one entry per line.

    Raises:
        InputError: a line is not valid, or its file name leads out of the folder.
            Links are followed: the images are the user's own.
        MissingExtraError: the table is Parquet, and pyarrow is not installed.
    """
    table = table_of(Path(given))
    assert table is not None  # it fits
    try:
        for where, row in _rows(table):
            name = row.get(_NAME)
            if not isinstance(name, str):
                raise InputError(f"{where}: expected file_name and text (found {', '.join(map(str, row))[:80]})")
            yield Entry(name, named(table.parent, name, f"{where}: file_name"), caption_of(row))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: not readable ({error})") from error


def _rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where a row is, and its fields."""
    if table.suffix == ".parquet":
        with needs("train"):
            import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
        batches = pyarrow.parquet.ParquetFile(table).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{table}: row {number}", row
    elif table.suffix == ".csv":
        first = next(read_lines(table), "")
        # Spreadsheets separate by tabs, and by semicolons where the comma is the decimal mark.
        mark = next((mark for mark in ",;\t" if _NAME in next(csv.reader([first], delimiter=mark), [])), ",")
        reader = csv.DictReader((line + "\n" for line in read_lines(table)), delimiter=mark)
        for row in reader:
            yield f"{table}:{reader.line_num}", row
    else:
        for number, line in enumerate(read_lines(table), 1):
            if not line.strip():
                continue
            where = f"{table}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: expected file_name and text ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected file_name and text (found a JSON {type(row).__name__})")
            yield where, row
