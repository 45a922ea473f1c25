"""Sources of training images and captions: one module per layout, read one entry at a time.

A layout module has `fits` (whether a `--data` has this layout), `identity`, `count` and `read`. `read` does not open
the images; `opened` does. So a resumed run can skip finished entries cheaply, and threads decode images in parallel.
An entry that is not usable becomes `Skipped` with the reason, so one bad image among a million stops nothing and is
listed. encoder.py handles prompts without images, and shapes world.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common.images import UnreadableImage, decoded

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = ("text", "caption", "prompt", "cogvlm_caption", "llava_caption", "TEXT", "alt_txt")
"""The names of caption fields, in order of preference."""


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


def caption_of(entry: Mapping[str, Any]) -> object:
    """Return the caption among an entry's fields, or None."""
    return next((entry[name] for name in CAPTIONS if entry.get(name)), None)
