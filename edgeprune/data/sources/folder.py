"""An imagefolder, as `datasets` reads it: images and `metadata.jsonl`, a line of `file_name` and caption per image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.files import files_digest
from edgeprune.data.imagefolder import METADATA
from edgeprune.data.sources import Entry, Skipped, caption_of

STREAMED = False


def fits(given: str) -> bool:
    """A folder with metadata.jsonl."""
    return (Path(given) / METADATA).is_file()


def identity(given: str) -> str:
    """By name, size and time of change of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Every line; no image is opened."""
    return sum(1 for _ in read(given))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Line by line; a path that leads out of the folder is no mistake that may pass.

    Raises:
        InputError: such a path, or a line that is none.
    """
    root, metadata = Path(given).resolve(), Path(given) / METADATA
    with metadata.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name = str(entry["file_name"])
                path = (root / name).resolve()
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{metadata}:{number}: expected file_name and text ({error})") from error
            if not path.is_relative_to(root):
                raise InputError(f"{metadata}:{number}: file_name: {name!r} leads out of the folder")
            yield Entry(name, path, caption_of(entry))
