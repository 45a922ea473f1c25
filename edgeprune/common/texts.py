"""The one reader of text that people bring: prompts, captions, sidecar files, tables.

Text is UTF-8 or, where it begins with the byte order mark, UTF-16; a mark is not part of the text. Lines end at
newlines only (LF, CR LF, CR): `str.splitlines` would also split a caption at U+2028, U+0085 and other characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

_NEWLINE = re.compile("\r\n|\n|\r")


def decoded_text(data: bytes) -> str:
    """Decode text.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    return _checked(data.decode(_encoding(data)))


def lines_of(text: str) -> list[str]:
    """Split text at newlines."""
    return _NEWLINE.split(text)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    return decoded_text(path.read_bytes())


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, which may be larger than memory, without their ends.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    with path.open("rb") as file:
        encoding = _encoding(file.read(2))
    with path.open(encoding=encoding, newline=None) as lines:
        for line in lines:
            yield _checked(line.removesuffix("\n"))


def _encoding(start: bytes) -> str:
    return "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _checked(text: str) -> str:
    if "\0" in text:
        raise ValueError("found a null character, expected UTF-8, or UTF-16 with a byte order mark")
    return text
