"""Writes measured tables between the marks of a page of docs/ and leaves the rest of the page as it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.experiments.teachers import TEACHERS, Teacher, add_option

MARKS = "<!-- {} -->", "<!-- end -->"


def check_marks(page: Path, name: str) -> None:
    """Refuse a page without a place for a table, before hours of measuring.

    Raises:
        InputError: the page has no `<!-- name -->`.
    """
    begin, end = MARKS[0].format(name), MARKS[1]
    if not page.is_file() or end not in page.read_text(encoding="utf-8").partition(begin)[2]:
        raise InputError(f"{page}: found no {begin}; add it and {end}, a line each, where the table belongs")


def insert(page: Path, text: str, name: str = "measured") -> None:
    """Replace the text between `<!-- name -->` and the next `<!-- end -->`."""
    begin, end = MARKS[0].format(name), MARKS[1]
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def command(name: str, description: str | None, table: Callable[[Path, Teacher], str]) -> None:
    """Read `-o`, `--teacher` and `--write` from the command line, measure, and print the table or write it into a page.

    Args:
        name: of the experiment's module.
        description: for `--help`.
        table: measures a teacher in a folder, and returns the table in Markdown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m edgeprune.experiments.{name}", description=description)
    parser.add_argument("-o", "--out", type=Path, default=Path("build") / name.replace("_", "-"))
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    add_option(parser)
    args = parser.parse_args()
    teacher = TEACHERS[args.teacher]
    mark = teacher.named("measured")
    try:
        if args.write:
            check_marks(args.write, mark)
        text = table(teacher.folder(args.out), teacher)
        if args.write:
            insert(args.write, text, mark)
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")
    print(text)
