"""YE-POP's layout: JSON files of `{"id": {"filename": …, "cogvlm_caption": …}, …}` in the same folder as the images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.common.files import files_digest, named
from edgeprune.common.texts import read_text
from edgeprune.data.grouping import is_hidden
from edgeprune.data.sources import Entry, Skipped, caption_of

STREAMED = False


def fits(given: str) -> bool:
    """Return whether this is a folder with such JSON files; a few are looked at."""
    return any(
        isinstance(entry, dict) and "filename" in entry
        for path in _files(given)[:8]
        for entry in (_entries(path) or {}).values()
    )


def _files(given: str) -> list[Path]:
    root = Path(given)
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in found if path.suffix.lower() == ".json" and not is_hidden(path.name)]


def _entries(path: Path) -> dict[str, Any] | None:
    """Return the entries of a JSON file; None if it has none."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


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
    for path in _files(given):
        entries = _entries(path)
        if entries is None:
            yield Skipped(path.name, "not readable as a JSON object")
            continue
        for key, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
                yield Skipped(f"{path.name}: {key}", "no filename")
                continue
            name = entry["filename"]
            yield Entry(name, named(root, name, f"{path}: {key}: filename"), caption_of(entry))
