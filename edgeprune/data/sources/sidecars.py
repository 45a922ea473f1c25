"""Images with their captions in files beside them, as trainers have them: `01.jpg` with `01.txt` or `01.caption`.

Subfolders are read too, such as `train/` or kohya's `10_name/`. grouping.py says what belongs together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgeprune.common.files import files_digest
from edgeprune.common.texts import read_text
from edgeprune.data.grouping import Group, grouped, is_hidden
from edgeprune.data.sources import NO_IMAGE, Entry, Skipped

STREAMED = False
_TEXTS = (".txt", ".caption")
"""In order of preference."""


def fits(given: str) -> bool:
    """Return whether this is a folder in which an image has a caption beside it."""
    return any(group.image and group.texts for group in _groups(given))


def _groups(given: str) -> list[Group]:
    root, names = Path(given), list[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not is_hidden(name) and not _leads_back(Path(folder, name)))
        names += [(place / name).as_posix() for name in sorted(files)]
    return grouped(names, _TEXTS)


def _leads_back(folder: Path) -> bool:
    """Return whether a folder is a link to one above itself."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def identity(given: str) -> str:
    """Return a digest of the name, size and modification time of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Count the entries; no file is opened."""
    return len(_groups(given))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield the entries folder by folder, in the order of the names."""
    root = Path(given)
    for group in _groups(given):
        if group.image is None:
            yield Skipped(next(iter(group.texts.values())), NO_IMAGE)
            continue
        text = next((group.texts[kind] for kind in _TEXTS if kind in group.texts), None)
        try:
            yield Entry(group.image, root / group.image, text and read_text(root / text))
        except (OSError, ValueError) as error:
            kind = Path(str(text)).suffix
            yield Skipped(group.image, f"its {kind} is not readable as text ({type(error).__name__})")
