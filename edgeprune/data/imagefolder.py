"""A folder of images with `metadata.jsonl`, as `datasets` reads it: one line with `file_name` and `text` per image.

The prompt may be named `prompt` too. GenEval's own layout is read as well: `00000/metadata.jsonl` with one `prompt`,
and its images in `00000/samples/`.

Lines written by `edgeprune score` also have a `seed`. Other columns are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import named, parse_json, read_json
from edgeprune.common.texts import lines_of, read_text
from edgeprune.data.grouping import IMAGES, is_hidden

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Sample:
    """An image file and its caption."""

    path: Path
    text: str
    seed: int | None = None
    """The seed of the noise that the image was generated from, if known."""


def is_images(folder: Path) -> bool:
    """Return whether a folder holds images with their prompts rather than a model."""
    return (folder / METADATA).is_file() or bool(_geneval(folder))


def _geneval(folder: Path) -> list[Path]:
    """Return the folders of GenEval's prompts, in its order."""
    found = sorted(folder.glob(f"[0-9]*/{METADATA}"))
    return [path.parent for path in found if (path.parent / "samples").is_dir()]


def read_samples(folder: Path) -> list[Sample]:
    """Read the image files and captions of a folder, in the order of its metadata.

    Raises:
        InputError: the metadata is missing or empty, a line is not valid, or a file name leads out of the folder.
            Links are followed: the images are the user's own.
    """
    if (folder / METADATA).is_file() or not (places := _geneval(folder)):
        return _listed(folder)
    out = []
    for place in places:
        metadata = place / METADATA
        text = _prompt(read_json(metadata), metadata)
        images = (path for path in sorted((place / "samples").iterdir()) if path.suffix.lower() in IMAGES)
        out += [Sample(path, text) for path in images if not is_hidden(path.name)]
    if not out:
        raise InputError(f"{folder}: found no images in {places[0].name}/samples and the folders beside it")
    return out


def _prompt(entry: dict[str, Any], where: object) -> str:
    """Return an entry's prompt, which is named `text` or `prompt`."""
    return fields.text(entry, "prompt" if "prompt" in entry and "text" not in entry else "text", where)


def _listed(folder: Path) -> list[Sample]:
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
        out.append(Sample(path, _prompt(entry, where), seed))
    if not out:
        raise InputError(f"{metadata}: lists no images")
    return out
