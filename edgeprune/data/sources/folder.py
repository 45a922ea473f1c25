"""An imagefolder as `datasets` reads it: images, and `metadata.jsonl` with `file_name` and a caption per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.files import files_digest, named
from edgeprune.data.imagefolder import METADATA
from edgeprune.data.sources import Entry, Skipped, caption_of

STREAMED = False


def fits(given: str) -> bool:
    """Return whether this is a folder with metadata.jsonl."""
    return (Path(given) / METADATA).is_file()


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
    """
    root, metadata = Path(given), Path(given) / METADATA
    with metadata.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name = str(entry["file_name"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{metadata}:{number}: expected file_name and text ({error})") from error
            yield Entry(name, named(root, name, f"{metadata}:{number}: file_name"), caption_of(entry))
