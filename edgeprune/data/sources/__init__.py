"""Where training images and their captions come from: each layout a file of its own, read one entry at a time.

A layout has `fits` (whether a `--data` is of it), `identity`, `count` and `read`. Entries are not opened yet (`opened`
does), so that going past what is done costs little and images are decoded in parallel. What cannot be used is passed on
with the reason, so that a bad image among a million stops nothing and is listed. What it leaves out: prompts without
images and shapes world, for which encode.py makes images.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = ("text", "caption", "prompt", "cogvlm_caption", "llava_caption", "TEXT", "alt_txt")
"""Names that a caption goes by, the better ones first."""
MAX_PIXELS = 2**26
"""A larger image is skipped before it is unpacked."""


@dataclass(frozen=True)
class Entry:
    """An image file that nobody has looked at yet, and what stands for its caption."""

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
    """What cannot be used."""

    name: str
    why: str


class Layout(Protocol):
    """One way in which images and captions are kept."""

    STREAMED: bool
    """Whether there may be no end of it, so that only so many are taken."""

    def fits(self, given: str) -> bool:
        """Whether `--data` names something of this layout."""

    def identity(self, given: str) -> str:
        """Changes when the content does; without reading all of it."""

    def count(self, given: str) -> int | None:
        """How many entries `read` gives; None where only reading tells."""

    def read(self, given: str) -> Iterator[Entry | Skipped]:
        """Everything, in an order that stays.

        Raises:
            InputError: the whole of it cannot be used.
        """


def layout_of(given: str) -> Layout | None:
    """The layout of a `--data`, or None where it is none of images."""
    for info in pkgutil.iter_modules(__path__):
        layout: Any = importlib.import_module(f"{__name__}.{info.name}")
        if layout.fits(given):
            found: Layout = layout
            return found
    return None


def opened(entry: Entry) -> Pair | Skipped:
    """An entry's image, decoded, and its caption, if both are good."""
    from PIL import Image

    if not isinstance(entry.text, str) or not entry.text.strip():
        found = "none" if entry.text is None else repr(str(entry.text)[:40])
        return Skipped(entry.name, f"caption: found {found}, expected text")
    try:
        with Image.open(io.BytesIO(entry.file) if isinstance(entry.file, bytes) else entry.file) as image:
            if image.width * image.height > MAX_PIXELS:
                why = f"found {image.width} x {image.height}, expected at most {MAX_PIXELS} pixels"
                return Skipped(entry.name, why)
            return Pair(entry.name, image.convert("RGB"), entry.text.strip())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Skipped(entry.name, f"not a readable image ({type(error).__name__})")


def caption_of(entry: Mapping[str, Any]) -> object:
    """The caption among an entry's fields, or None."""
    return next((entry[name] for name in CAPTIONS if entry.get(name)), None)
