"""YE-POP's layout: JSON files of `{"id": {"filename": …, "cogvlm_caption": …}, …}` in the same folder as the images."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.common.files import files_digest, named
from edgeprune.data.sources import Entry, Skipped, caption_of

STREAMED = False


def fits(given: str) -> bool:
    """Return whether this is a folder with such JSON files."""
    first = next(iter(_files(given)), None)
    return first is not None and any(isinstance(e, dict) and "filename" in e for e in _entries(first).values())


def _files(given: str) -> list[Path]:
    return sorted(Path(given).glob("*.json")) if Path(given).is_dir() else []


def _entries(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def identity(given: str) -> str:
    """Return a digest of the name, size and modification time of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Count the entries; no image is opened."""
    return sum(1 for _ in read(given))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield the entries JSON file by JSON file, in the order of the files' names.

    Raises:
        InputError: a file name leads out of the folder.
            Links are followed: the images are the user's own.
    """
    root = Path(given)
    for path, (key, entry) in itertools.chain.from_iterable(
        ((path, item) for item in _entries(path).items()) for path in _files(given)
    ):
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            yield Skipped(f"{path.name}: {key}", "no filename")
            continue
        name = entry["filename"]
        yield Entry(name, named(root, name, f"{path}: {key}: filename"), caption_of(entry))
