"""A folder of images with `metadata.jsonl`, as `datasets` reads it: one line with `file_name` and `text` per image.

Lines written by `edgeprune score` also have a `seed`. Other columns are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import named, parse_json
from edgeprune.common.texts import lines_of, read_text

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Sample:
    """An image file and its caption."""

    path: Path
    text: str
    seed: int | None = None
    """The seed of the noise that the image was generated from, if known."""


def read_samples(folder: Path) -> list[Sample]:
    """Read the image files and captions of a folder, in the order of its metadata.

    Raises:
        InputError: the metadata is missing or empty, a line is not valid, or a file name leads out of the folder.
            Links are followed: the images are the user's own.
    """
    metadata = folder / METADATA
    if not metadata.is_file():
        raise InputError(f'{folder}: no {METADATA}; expected lines like {{"file_name": …, "text": …}}')
    out = []
    try:
        lines = lines_of(read_text(metadata))
    except (OSError, ValueError) as error:
        raise InputError(f"{metadata}: not readable ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{metadata}:{number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: expected file_name and text ({error})") from error
        if not isinstance(entry, dict):
            raise InputError(f"{where}: found {shown(entry)}, expected file_name and text")
        path = named(folder, fields.text(entry, "file_name", where), f"{where}: file_name")
        seed = None if entry.get("seed") is None else fields.whole_number(entry, "seed", where, least=0, most=2**63 - 1)
        out.append(Sample(path, fields.text(entry, "text", where), seed))
    if not out:
        raise InputError(f"{metadata}: lists no images")
    return out
