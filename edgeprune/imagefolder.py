"""A folder of images with `metadata.jsonl`, as `datasets` reads it: one line of `file_name` and `text` per image.

Lines that `edgeprune score` writes also have the `seed`. What it leaves out: other columns, nested datasets, arrow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError

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
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{metadata}: not readable as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, text = (folder / entry["file_name"]).resolve(), str(entry["text"])
            seed = entry.get("seed")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{metadata}:{number}: expected file_name and text ({error})") from error
        if not path.is_relative_to(folder.resolve()):
            raise InputError(f"{metadata}:{number}: file_name: {entry['file_name']!r} leads out of the folder")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InputError(f"{metadata}:{number}: seed: found {seed!r}, expected a number from 0 on")
        out.append(Sample(path, text, seed))
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
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from error
