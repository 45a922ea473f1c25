"""Sources of training images and captions: one module per layout, read one entry at a time.

A layout module has `fits` (whether a `--data` has this layout), `identity`, `count` and `read`. `read` does not open
the images; `opened` does. So a resumed run can skip finished entries cheaply, and threads decode images in parallel.
An entry that is not usable becomes `Skipped` with the reason, so one bad image among a million stops nothing and is
listed. encoder.py handles prompts without images, and shapes world.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common.errors import InputError
from edgeprune.common.images import UnreadableImage, decoded

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = (
    *("text", "caption", "prompt", "cogvlm_caption", "llava_caption", "alt_txt", "txt", "description", "captions"),
    *("texts", "prompts", "alt_text", "sentence", "sentences", "long_caption", "short_caption"),
)
"""The names of caption fields, in order of preference; upper and lower case are the same."""
MOST_UNUSABLE = 1000
"""A run ends after this many entries in a row that cannot be used."""
NO_IMAGE = "no image beside it"


@dataclass(frozen=True)
class Entry:
    """An image file that has not been opened, and the value of its caption field."""

    name: str
    file: Path | bytes
    text: object


@dataclass(frozen=True)
class Pair:
    """An image (RGB) and its caption."""

    name: str
    image: Image.Image
    text: str


@dataclass(frozen=True)
class Skipped:
    """An entry that is not usable, and why. The reason is written to the cache, so its wording is part of a shard."""

    name: str
    why: str


class Layout(Protocol):
    """A way in which images and captions are stored. `given` is always the value of `--data`."""

    STREAMED: bool
    """Whether the source may be endless, so that a cache takes a limited number of samples."""

    def fits(self, given: str) -> bool:
        """Return whether `--data` names a source of this layout."""

    def identity(self, given: str) -> str:
        """Return a digest that changes with the content, without reading all of it."""

    def count(self, given: str) -> int | None:
        """Return the number of entries that `read` yields; None if the source must be read to know."""

    def read(self, given: str) -> Iterator[Entry | Skipped]:
        """Yield all entries, always in the same order.

        Raises:
            InputError: the source as a whole is not usable.
        """


def layout_of(given: str) -> Layout | None:
    """Return the layout of a `--data`; None if it is not a source of images."""
    for info in pkgutil.iter_modules(__path__):
        module: Any = importlib.import_module(f"{__name__}.{info.name}")
        if module.fits(given):
            layout: Layout = module
            return layout
    return None


def opened(entry: Entry) -> Pair | Skipped:
    """Decode an entry's image and check its caption."""
    if not isinstance(entry.text, str) or not entry.text.strip():
        found = "none" if entry.text is None else repr(str(entry.text)[:40])
        return Skipped(entry.name, f"caption: found {found}, expected text")
    try:
        return Pair(entry.name, decoded(entry.file), entry.text.strip())
    except UnreadableImage as error:
        return Skipped(entry.name, str(error))


def check_first(layout: Layout, given: str) -> None:
    """Look for an entry that can be used, before anything is downloaded or loaded for it.

    Raises:
        InputError: there is none among the first MOST_UNUSABLE, or the source as a whole is not usable.
    """
    first: Skipped | None = None
    for item in itertools.islice(layout.read(given), MOST_UNUSABLE):
        found = opened(item) if isinstance(item, Entry) else item
        if isinstance(found, Pair):
            return
        first = first or found
    raise InputError(none_usable(given, first))


def none_usable(given: str, first: Skipped | None) -> str:
    """Return the error for a source of which nothing can be used, with the first reason."""
    why = f": {first.name}: {first.why}" if first else ""
    return f"--data {given}: no image with a caption that can be used{why}"


def caption_of(entry: Mapping[str, Any]) -> object:
    """Return the first text among an entry's caption fields; of a list, its first text.

    Without any, what the first field holds (a number, NaN) for the reason, or None.
    """
    fields = {str(name).lower(): value for name, value in entry.items()}
    found = [fields[name] for name in CAPTIONS if fields.get(name)]
    values = (item for value in found for item in (value if isinstance(value, (list, tuple)) else [value]))
    return next((v for v in values if isinstance(v, str) and v.strip()), found[0] if found else None)


def caption_column(names: Iterable[str]) -> str | None:
    """Return the first of a table's columns that may hold captions, or None."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in CAPTIONS if name in by_lower), None)
