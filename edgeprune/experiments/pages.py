"""Writes measured tables between the marks of a page of docs/ and leaves the rest of the page as it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

MARKS = "<!-- {} -->", "<!-- end -->"


def insert(page: Path, text: str, name: str = "measured") -> None:
    """Replace the text between `<!-- name -->` and the next `<!-- end -->`."""
    begin, end = MARKS[0].format(name), MARKS[1]
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def command(name: str, description: str | None, table: Callable[[Path], str]) -> None:
    """Read `-o` and `--write` from the command line, measure, and print the table or write it into a page.

    Args:
        name: of the experiment's module.
        description: for `--help`.
        table: measures in a folder, and returns the table in Markdown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m edgeprune.experiments.{name}", description=description)
    parser.add_argument("-o", "--out", type=Path, default=Path("build") / name.replace("_", "-"))
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    args = parser.parse_args()
    text = table(args.out)
    if args.write:
        insert(args.write, text)
    print(text)
