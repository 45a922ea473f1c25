"""The tables of docs/evidence.md: grids of `edgeprune compare` on the teachers of shapes world.

    python -m edgeprune.experiments.evidence                                          # lists the rows
    python -m edgeprune.experiments.evidence shapes-untrained-0.16 --write docs/evidence.md

A row is a grid on a teacher at a budget. Its runs are kept in docs/evidence/ROW.json, also those of a row that was
interrupted, from which another goes on. The page is made from these files. The rows `demo` and `demo-untrained` have
places of their own in the page.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.artefact.teachers import SHAPES
from edgeprune.common.errors import EdgepruneError
from edgeprune.common.files import digest, read_json, write_json
from edgeprune.common.tables import markdown_table
from edgeprune.compare import page
from edgeprune.compare.grid import Grid, grid_named
from edgeprune.compare.run import compare, prompts_to_score
from edgeprune.compare.summary import summarise
from edgeprune.experiments.pages import check_marks, insert
from edgeprune.experiments.teachers import TEACHERS, Teacher, teacher_named
from edgeprune.stages.compress import preset
from edgeprune.stages.workspace import Workspace

RESULTS = Path("docs/evidence")
OWN_PLACES = ("demo", "demo-untrained")
"""Rows whose tables have a place of their own in the page; the others follow one another in that of `rows`."""
PER_TASK = 30
BUDGETS = (0.22, 0.16, 0.12)
_TITLES = {"equal-work": "trained for equal work", "untrained": "not trained"}


@dataclass(frozen=True)
class Row:
    """A grid on a teacher."""

    name: str
    teacher: Teacher
    grid_name: str
    budget: float | None = None
    """Share of the bf16 bytes; None for that of the grid."""

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid at this budget."""
        found = Grid.load(grid_named(self.grid_name), preset("default", world=self.teacher.world))
        return replace(found, budget=self.budget or found.budget)

    @functools.cached_property
    def prompts(self) -> list[str]:
        """The captions that it is scored on, task by task."""
        return prompts_to_score(world=self.teacher.world, prompts=None, per_task=PER_TASK)

    @property
    def tasks(self) -> list[str]:
        """The task of each caption."""
        return [self.teacher.world.grammar.parse(prompt).task for prompt in self.prompts]

    @property
    def kept(self) -> Path:
        """The file of its runs."""
        return RESULTS / f"{self.name}.json"

    @property
    def title(self) -> str:
        """A heading."""
        return f"{self.teacher.name} at {self.grid.budget:g} of the bf16 bytes, {_TITLES[self.grid_name]}"


def rows() -> dict[str, Row]:
    """Return the rows by name, in the order of the page."""
    built_in = teacher_named(SHAPES)
    found = [Row(name, built_in, name) for name in OWN_PLACES]
    for teacher in TEACHERS.values():
        found.append(Row(f"{teacher.name}-equal-work", teacher, "equal-work"))
        found += [Row(f"{teacher.name}-untrained-{budget:g}", teacher, "untrained", budget) for budget in BUDGETS]
    return {row.name: row for row in found}


def measure(row: Row, out: Path) -> None:
    """Run what is missing of a row, and keep its runs."""
    folder, original = out / row.name, out / f"{row.teacher.name}-original"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    if row.kept.is_file() and not results.is_file():
        write_json(results, read_json(row.kept)["results"])
    try:
        compare(Workspace(original, row.teacher.model), row.grid, "shapes", row.prompts, folder, _show)
    finally:
        if results.is_file():
            machine = f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
            RESULTS.mkdir(exist_ok=True)
            kept = {"grid": _identity(row), "machine": machine, "results": read_json(results)}
            if not row.kept.is_file() or read_json(row.kept)["results"] != kept["results"]:
                write_json(row.kept, kept)


def is_done(row: Row) -> bool:
    """Return whether all of its runs are kept."""
    if not row.kept.is_file():
        return False
    kept = read_json(row.kept)
    names = {"original"} | {f"{one.name}/seed-{seed}" for one in row.grid.rows for seed in range(one.seeds)}
    return bool(kept["grid"] == _identity(row) and names <= kept["results"].keys())


def _identity(row: Row) -> str:
    """Return a digest of what a row compares: figures of another grid, budget or work are not its own."""
    runs = [
        (one.name, seed, one.seeded(seed, 0).to_json(), one.quantized, one.work)
        for one in row.grid.rows
        for seed in range(one.seeds)
    ]
    return digest([row.teacher.name, row.grid.budget, row.prompts, runs])


def table(row: Row) -> tuple[dict[str, Any], str]:
    """Return the summary of a row that is done, and its table."""
    kept = read_json(row.kept)
    summary = summarise(kept["results"], row.grid, row.tasks)
    return summary, f"{page.markdown(summary)}\n\n{kept['machine']}, {summary['seconds'] / 60:.0f} minutes."


def write_page(path: Path) -> None:
    """Write the tables of all rows that are done, and the plots of those with a place of their own."""
    texts = []
    for row in filter(is_done, rows().values()):
        summary, text = table(row)
        if row.name not in OWN_PLACES:
            texts.append(f"### {row.title}\n\n{text}")
            continue
        insert(path, text, row.name)
        folder = path.with_name(f"{path.stem}-{row.name}.tmp")
        folder.mkdir(exist_ok=True)
        page.write(summary, folder)
        (folder / "compare.svg").replace(path.with_name(f"{path.stem}-{row.name}.svg"))
        shutil.rmtree(folder)
    if texts:
        insert(path, "\n\n".join(texts), "rows")


def listing() -> str:
    """Return a table of the rows."""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows().values():
            many = sum(one.seeds for one in row.grid.rows)
            yield (
                row.name,
                row.teacher.name,
                row.grid_name,
                f"{row.grid.budget:g}",
                str(many),
                "yes" if is_done(row) else "",
            )

    return markdown_table(("ROW", "teacher", "grid", "budget", "runs", "measured"), list(lines()))


def _show(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
    if what == "compare":
        print(f"{done} of {total} {note}", flush=True)


def main(
    row: Annotated[str | None, typer.Argument(help="Row to measure; without one, list all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/evidence"),
    write: Annotated[Path | None, typer.Option(help="Page whose tables to write.")] = None,
) -> None:
    """Measure a row, and write the tables of all that are measured into a page if one is given."""
    known = rows()
    if row is not None and row not in known:
        raise SystemExit(f"ROW={row}: expected one of {', '.join(known)}")
    try:
        if write is not None:
            check_marks(write, row if row in OWN_PLACES else "rows")
        if row is not None:
            measure(known[row], out)
            print(table(known[row])[1])
        elif write is None:
            print(listing())
        if write is not None:
            write_page(write)
    except EdgepruneError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
