"""Reproduces docs/evidence.md: python -m edgeprune.experiments.evidence --out build/compare --write docs/evidence.md

Runs the two grids (`edgeprune compare`) on the built-in model, or on another teacher with --teacher, writes their
tables and run times into the page, and copies their plots next to it. An interrupted run resumes.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path

import typer

from edgeprune.common.errors import EdgepruneError
from edgeprune.compare import page
from edgeprune.compare.grid import Grid, grid_named
from edgeprune.compare.run import compare, prompts_to_score
from edgeprune.experiments.pages import insert
from edgeprune.experiments.teachers import BUILT_IN, teacher_named
from edgeprune.stages.compress import preset
from edgeprune.stages.workspace import Workspace

PRESETS = ("demo", "demo-untrained")


def _show(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
    if what == "compare":
        print(f"{done} of {total} {note}", flush=True)


def main(
    out: Path = Path("build/compare"), write: Path | None = None, per_task: int = 30, teacher: str = BUILT_IN.name
) -> None:
    """Run both grids and write the page."""
    chosen = teacher_named(teacher)
    runs, world = chosen.folder(out), chosen.world
    for name in PRESETS:
        folder = runs / name
        folder.mkdir(parents=True, exist_ok=True)
        grid = Grid.load(grid_named(name), preset("default", world=world))
        prompts = prompts_to_score(world=world, prompts=None, per_task=per_task)
        print(name, flush=True)
        summary = compare(Workspace(runs / "original", chosen.model), grid, "shapes", prompts, folder, _show)
        page.write(summary, folder)
        minutes = summary["seconds"] / 60
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes."
        text = f"{page.markdown(summary)}\n\n{machine}"
        print(text)
        if write is not None:
            insert(write, text, chosen.named(name))
            shutil.copyfile(folder / "compare.svg", write.with_name(f"evidence-{chosen.named(name)}.svg"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except EdgepruneError as error:
        raise SystemExit(str(error)) from None
