"""A dataset of the Hugging Face hub (`datasets:NAME` or `datasets:NAME:SPLIT`, streamed), or one that `datasets` saved.

Needs the extra `train`. Code of a dataset is never run. Never executed against the hub by us; local folders are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.files import digest, files_digest
from edgeprune.data.sources import Entry, Skipped, caption_of

_PREFIX = "datasets:"


STREAMED = True


def fits(given: str) -> bool:
    """By its prefix."""
    return given.startswith(_PREFIX)


def identity(given: str) -> str:
    """Of a local one its files by size and time of change; of the hub's the name: what is under it may change."""
    return digest([given, files_digest(Path(given.removeprefix(_PREFIX).partition(":")[0]))])


def count(given: str) -> int | None:
    """Not known before it is read."""
    return None


def read(given: str) -> Iterator[Entry | Skipped]:
    """Row by row; the image is the first column that holds images.

    Raises:
        MissingExtraError: datasets is not installed.
        InputError: there is no such dataset, or it holds no images.
    """
    with needs("train"):
        import datasets  # type: ignore[import-not-found,unused-ignore]
    name, _, split = given.removeprefix(_PREFIX).partition(":")
    try:
        if (Path(name) / "dataset_info.json").is_file():
            rows: Any = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        image = next((n for n, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise InputError(f"{given}: found no image among its columns: {', '.join(rows.features or {}) or 'none'}")
        # Undecoded, so that a bad one is ours to skip.
        for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
            file = row[image] or {}
            content = file.get("bytes") or (Path(file["path"]) if file.get("path") else None)
            if content is None:
                yield Skipped(f"row {number}", "no image")
            else:
                yield Entry(f"row {number}", content, caption_of(row))
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # what datasets raises for what it cannot find
        raise InputError(f"{given}: cannot be read ({' '.join(str(error).split())[:300]})") from error
