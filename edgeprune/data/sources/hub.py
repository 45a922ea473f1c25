"""A dataset on the Hugging Face hub (`datasets:NAME` or `datasets:NAME:SPLIT`, streamed), or one saved by `datasets`.

Needs the extra `train`. A dataset's own code is never run. Tested with local folders only, never against the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.files import digest, files_digest
from edgeprune.data.sources import Entry, Skipped, caption_column, caption_of

STREAMED = True
_PREFIX = "datasets:"


def fits(given: str) -> bool:
    """Return whether `given` has the prefix `datasets:`."""
    return given.startswith(_PREFIX)


def identity(given: str) -> str:
    """Return a digest of a local dataset's file sizes and times; for the hub, of the name, whose content may change."""
    return digest([given, files_digest(Path(given.removeprefix(_PREFIX).partition(":")[0]))])


def count(given: str) -> int | None:
    """Return None: the number of rows is unknown before they are read."""
    return None


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield one entry per row, with the image of the first column that holds images.

    Raises:
        MissingExtraError: datasets is not installed.
        InputError: the dataset does not exist or has no images.
    """
    with needs("train"):
        import datasets  # type: ignore[import-not-found,unused-ignore]
    name, _, split = given.removeprefix(_PREFIX).partition(":")
    try:
        if (Path(name) / "dataset_info.json").is_file():
            rows: Any = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        features = (rows.features or {}).items()
        image = next((n for n, kind in features if isinstance(kind, datasets.Image) or _holds_files(kind)), None)
        if image is None:
            raise InputError(f"{given}: found no image among its columns: {', '.join(rows.features or {}) or 'none'}")
        captions = _captions(given, rows.features, image)
        # Not decoded by `datasets`, so that a bad image is skipped instead of raising.
        for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
            file = row[image] or {}
            content = file.get("bytes") or (Path(file["path"]) if file.get("path") else None)
            if content is None:
                yield Skipped(f"row {number}", "no image")
            else:
                value = row[captions]
                # Where a row has nothing in this column, another one may hold its caption.
                text = caption_of(value if isinstance(value, Mapping) else {"text": value, **row})
                yield Entry(f"row {number}", content, text)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # what datasets raises if it finds nothing
        raise InputError(f"{given}: cannot be read ({' '.join(str(error).split())[:300]})") from error


def _holds_files(kind: object) -> bool:
    """Return whether a column holds images as Parquet files of others do: the content and the name of each."""
    return isinstance(kind, Mapping) and set(kind) == {"bytes", "path"}


def _captions(given: str, features: Mapping[str, Any], image: str) -> str:
    """Return the column of captions, and say which it is. Webdataset's `json` has fields of its own.

    Raises:
        InputError: no column has a name of captions, and several hold text or none.
    """
    others = [name for name in features if name != image]
    texts = [name for name in others if getattr(features[name], "dtype", None) in ("string", "large_string")]
    column = caption_column(others) or ("json" if "json" in others else texts[0] if len(texts) == 1 else None)
    if column is None:
        raise InputError(
            f"{given}: found no captions among its columns: {', '.join(others) or 'none'}; expected text, caption, "
            "prompt, description or a single column of text; rename the column"
        )
    warnings.warn(f"{given}: captions are taken from the column {column}", stacklevel=2)
    return column
