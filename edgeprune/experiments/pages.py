"""Writes measured tables between the marks of a page of docs/ and leaves the rest of the page as it is."""

from __future__ import annotations

from pathlib import Path

MARKS = "<!-- {} -->", "<!-- end -->"


def insert(page: Path, text: str, name: str = "measured") -> None:
    """Replace the text between `<!-- name -->` and the next `<!-- end -->`."""
    begin, end = MARKS[0].format(name), MARKS[1]
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
