"""A dataset of the Hugging Face hub, or one saved by `datasets`: `datasets:NAME` or `datasets:NAME:SPLIT`, streamed.

Needs the extra `train`. Code of a dataset is never run. Never executed against the hub by us; local folders are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.extras import needs
from edgeprune.files import digest
from edgeprune.sources import Pair, Skipped, caption_of

_PREFIX = "datasets:"


STREAMED = True


def fits(given: str) -> bool:
    """By its prefix."""
    return given.startswith(_PREFIX)


def identity(given: str) -> str:
    """The name: what the hub has under it may change."""
    return digest(given)


def read(given: str) -> Iterator[Pair | Skipped]:
    """Row by row; the image is the first column that holds one.

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
        for number, row in enumerate(rows):
            image = next((value for value in row.values() if hasattr(value, "convert")), None)
            if image is None:
                raise InputError(f"{given}: row {number}: found no image in {', '.join(row)}")
            text = caption_of(row)
            if isinstance(text, str) and text.strip():
                yield Pair(f"row {number}", image.convert("RGB"), text.strip())
            else:
                yield Skipped(f"row {number}", f"caption: found {str(text)[:40]!r}, expected text")
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # what datasets raises for what it cannot find
        raise InputError(f"{given}: cannot be read ({' '.join(str(error).split())[:300]})") from error
