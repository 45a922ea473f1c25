"""A folder of images with `metadata.jsonl`, as `datasets` reads it: one line of `file_name` and `text` per image.

Lines that `edgeprune score` writes also have the `seed`. What it leaves out: other columns, nested datasets, arrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import inside, parse_json

if TYPE_CHECKING:
    from PIL import Image

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One image and what it is of."""

    path: Path
    text: str
    seed: int | None = None
    """Of the noise that it was made from, where that is known."""


def read_samples(folder: Path) -> list[Sample]:
    """The images of a folder, in the order of its metadata.

    Raises:
        InputError: no metadata, a bad line, a path that leads out of the folder, or no image.
    """
    metadata = folder / METADATA
    if not metadata.is_file():
        raise InputError(f'{folder}: no {METADATA}; expected lines like {{"file_name": …, "text": …}}')
    out = []
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
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
        path = inside(folder, fields.text(entry, "file_name", where), f"{where}: file_name")
        seed = None if entry.get("seed") is None else fields.whole(entry, "seed", where, least=0, most=2**63 - 1)
        out.append(Sample(path, fields.text(entry, "text", where), seed))
    if not out:
        raise InputError(f"{metadata}: no images in it")
    return out


def open_image(path: Path) -> Image.Image:
    """An image as RGB.

    Raises:
        InputError: it cannot be read.
    """
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from error
