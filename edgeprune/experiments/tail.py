"""The tables of docs/distill.md: all weights, PWP and PWP from states at equal work, on a teacher.

    python -m edgeprune.experiments.tail -o build/tail [--teacher rich-sd3] [--write docs/distill.md]

It takes the extra adamw8bit. An interrupted run goes on with the row that it was at. With --write it keeps what it has
in docs/distill.json, or in the file of another teacher, from which another goes on. Several at a time share the rows:
each takes one that no other works on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.artefact.loading import load_transformer
from edgeprune.common.errors import LockedError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.lock import hold
from edgeprune.common.tables import markdown_table
from edgeprune.data.encode import make_cache
from edgeprune.data.settings import SHAPES, CacheOptions, settings_of
from edgeprune.experiments import held_out
from edgeprune.experiments.held_out import Held
from edgeprune.experiments.pages import command
from edgeprune.experiments.teachers import Teacher
from edgeprune.planning.options import QUARTER, PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.stages import analyze, distill, plan, prune, quantize
from edgeprune.stages.options import AnalyzeOptions, DataOptions, QuantizeOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import ADAMW, EIGHT_BIT, DistillOptions, Recipe
from edgeprune.training.work import steps_in

WORK = 100_000
"""Evaluations of a block by one sample that each row trains for; a backward pass counts as two."""
BATCH = 16
SEEDS = (0, 1, 2)
PER_TASK = 30
"""Held-out captions of each task."""
STATES = 2048
SAMPLES = 2048
BLOCKS, COMPONENTS = "blocks", "components"
GUIDANCE = 2.0
"""The teachers' scale."""

RESULTS = Path("docs/distill.json")
_VALUES = [name for name, _ in held_out.MEASURED.values()]
_WAIT_S = 5.0


@dataclass(frozen=True)
class Row:
    """What is trained."""

    removed: str
    """BLOCKS or COMPONENTS: the teacher's."""
    way: str
    """`all` weights, what follows the first removed part (`pwp`), or that from states (`tail`)."""
    stand_in: bool = False
    graded: bool = False
    calibration: str = "none"
    """Of the prefix."""
    optimizer: str = ADAMW
    guided: bool = False
    """Whether the student learns the guided velocity."""

    @property
    def extra(self) -> bool:
        """Whether it is no part of the comparison of all weights, PWP and PWP from states."""
        return self not in COMPARED

    @property
    def key(self) -> str:
        """A name that no other row has."""
        parts = (self.way, "stand-in", "graded", self.calibration, self.optimizer, "guided")
        given = (
            True, self.stand_in, self.graded, self.calibration != "none", self.optimizer != ADAMW, self.guided,
        )  # fmt: skip
        return "-".join([self.removed, *(part for part, is_given in zip(parts, given, strict=True) if is_given)])


COMPARED = tuple(Row(BLOCKS, way, stand_in) for stand_in in (False, True) for way in ("all", "pwp", "tail"))


def rows(teacher: Teacher) -> Iterator[Row]:
    """Yield what is compared. Guidance that is an input cannot be learned."""
    yield from COMPARED
    yield Row(BLOCKS, "tail", calibration="feedback")
    for graded in (False, True):
        yield Row(COMPONENTS, "pwp", graded=graded)
    if teacher.guided:
        yield Row(BLOCKS, "tail", guided=True)
    yield Row(BLOCKS, "tail", optimizer=EIGHT_BIT)


def options(row: Row, chosen: PrunePlan, seed: int) -> DistillOptions:
    """Return the options of a row, with as many steps as its work allows."""
    found = DistillOptions(
        batch=BATCH, rate=5e-4, schedule="cosine", ema=0.98,
        seed=seed, freeze_prefix=row.way != "all", sensitivity="graded" if row.graded else "off",
        states=STATES if row.way == "tail" else 0,
        prefix_calibration=row.calibration if row.way == "tail" else None, optimizer=row.optimizer,
        guidance=GUIDANCE if row.guided else None,
    )  # fmt: skip
    return replace(found, steps=steps_in(WORK, chosen, found.over(Recipe()), found))


def measure(out: Path, teacher: Teacher) -> None:
    """Measure what is missing of each row with each seed."""
    while not _alone(out / "data", lambda: encode(out, teacher)):
        time.sleep(_WAIT_S)
    held, known, folder = None, _known(teacher), out / f"original-{os.getpid()}"
    # Blocks first: other rows only add to them.
    wanted = sorted(((row, seed) for seed in SEEDS for row in rows(teacher)), key=lambda one: one[0].extra)
    while left := [
        (row, seed) for row, seed in wanted if not (_key(row, seed) in known or _path(out, row, seed).is_file())
    ]:
        held = held or Held(Workspace(folder, teacher.model), PER_TASK)
        ran = [_alone(_path(out, *one), partial(trained, *one, out, teacher, held)) for one in left]
        if not any(ran):  # others work on the rest
            time.sleep(_WAIT_S)
    shutil.rmtree(folder, ignore_errors=True)


def _known(teacher: Teacher) -> dict[str, dict[str, Any]]:
    kept = teacher.results(RESULTS)
    return read_json(kept) if kept.is_file() else {}


def collected(out: Path, teacher: Teacher) -> dict[str, dict[str, Any]]:
    """Return the figures of all rows and seeds that were measured, here or before; keep them in RESULTS."""
    found = _known(teacher)
    for seed in SEEDS:
        for row in rows(teacher):
            if (path := _path(out, row, seed)).is_file():
                found[_key(row, seed)] = read_json(path)
    write_json(teacher.results(RESULTS), found)
    return found


def _key(row: Row, seed: int) -> str:
    return f"{row.key}-{seed}"


def _path(out: Path, row: Row, seed: int) -> Path:
    return out / "found" / f"{_key(row, seed)}.json"


def _alone(path: Path, work: Callable[[], None]) -> bool:
    """Do what makes a file or folder unless it is there, and return whether it is; not where another process does."""
    try:
        with hold(path.parent / f"{path.name}.lock", path):
            if not path.exists():
                work()
            return True
    except LockedError:
        return False


def encode(out: Path, teacher: Teacher) -> None:
    """Draw the images that are trained on, and encode them."""
    ws, options = Workspace(out / "original", teacher.model), CacheOptions(SHAPES, SAMPLES)
    settings = settings_of(ws.source, ws.generation, options, computed_in=ws.original.computed_in(drawing=False))
    folder = out / "data"
    unfinished = folder.with_name("data.tmp")
    make_cache(lambda: ws.original.encoding(drawing=False), ws.source, unfinished, settings, ws.generation, options)
    unfinished.rename(folder)


def trained(row: Row, seed: int, out: Path, teacher: Teacher, held: Held) -> None:
    """Prune, train and quantize, and write what that loses."""
    shutil.rmtree(out / _key(row, seed), ignore_errors=True)  # so that all of the training is timed
    ws = Workspace(out / _key(row, seed), teacher.model)
    if row.removed == COMPONENTS:
        analyze.run(ws, AnalyzeOptions(estimator="gates", count=7))
        plan.run(ws, PlanOptions("manual", components=teacher.components))
    else:
        plan.run(ws, PlanOptions("manual", blocks=teacher.blocks[0], stand_in=QUARTER if row.stand_in else None))
    prune.run(ws)
    chosen = options(row, ws.plan(), seed)
    began = time.process_time()
    distill.run(ws, chosen, DataOptions(str(out / "data")))
    seconds = time.process_time() - began
    quantize.run(ws, QuantizeOptions())
    found = held.measure(load_transformer(ws.out, quantized=True), guided=row.guided)
    values = {name: [round(value, 4) for value in found[name]] for name in found}
    write_json(_path(out, row, seed), {"tasks": held.tasks, "steps": chosen.steps, "seconds": seconds} | values)
    shutil.rmtree(ws.out)
    print(_key(row, seed), np.mean(found["right"]), flush=True)


def table(found: dict[str, dict[str, Any]], teacher: Teacher) -> str:
    """Return what was measured in Markdown. Intervals are over captions, of each the mean of the seeds."""
    lines = []
    for row in rows(teacher):
        seeds = [found[_key(row, seed)] for seed in SEEDS if _key(row, seed) in found]
        if not seeds:
            continue

        names = {"all": "all weights", "pwp": "PWP", "tail": f"PWP from {STATES:,} states"}
        given = [names[row.way]] + ["graded"] * row.graded + ["prefix by feedback"] * (row.calibration != "none")
        given += ["guidance learned"] * row.guided + [row.optimizer] * (row.optimizer != ADAMW)
        removed = f"{row.removed} {teacher.blocks[0] if row.removed == BLOCKS else teacher.components}"
        lines.append(
            (
                removed, "stand-ins" if row.stand_in else "cut", ", ".join(given), str(len(seeds)),
                str(seeds[0]["steps"]),
                *held_out.cells(seeds),
                ", ".join(f"{one['seconds']:.0f} s" for one in seeds if one["seconds"] is not None),
            )
        )  # fmt: skip
    head = ("removed", "from", "trained", "seeds", "steps", *_VALUES, "processor time")
    return markdown_table(head, lines)


def contrasts() -> Iterator[tuple[str, Row, Row]]:
    """Yield each comparison: its name, a row, and the row to subtract from it."""
    for start, stand_in in (("cut", False), ("stand-ins", True)):
        whole, pwp, tail = (Row(BLOCKS, way, stand_in) for way in ("all", "pwp", "tail"))
        yield f"PWP less all weights, from {start}", pwp, whole
        yield f"PWP from states less all weights, from {start}", tail, whole
        yield f"PWP from states less PWP, from {start}", tail, pwp
    for way, name in (("all", "all weights"), ("pwp", "PWP"), ("tail", "PWP from states")):
        yield f"{name}: from stand-ins less from cut", Row(BLOCKS, way, stand_in=True), Row(BLOCKS, way)
    yield "prefix by feedback less nearest", Row(BLOCKS, "tail", calibration="feedback"), Row(BLOCKS, "tail")
    yield "components: graded less not", Row(COMPONENTS, "pwp", graded=True), Row(COMPONENTS, "pwp")
    yield "guidance learned less not", Row(BLOCKS, "tail", guided=True), Row(BLOCKS, "tail")
    yield f"{EIGHT_BIT} less {ADAMW}", Row(BLOCKS, "tail", optimizer=EIGHT_BIT), Row(BLOCKS, "tail")


def differences(found: dict[str, dict[str, Any]]) -> str:
    """Return the differences of rows as a Markdown table, paired by caption, over the seeds that both rows have."""
    lines = []
    for name, one, other in contrasts():
        pairs = [
            (found[_key(one, s)], found[_key(other, s)]) for s in SEEDS if {_key(one, s), _key(other, s)} <= {*found}
        ]
        if not pairs:
            continue
        lines.append((name, str(len(pairs)), *held_out.differences(pairs)))
    return markdown_table(("difference", "seeds", *_VALUES), lines)


def tables(out: Path, teacher: Teacher) -> str:
    """Measure and return both tables. Stopped with Ctrl-C, they are of what there is."""
    with contextlib.suppress(KeyboardInterrupt):
        measure(out, teacher)
    found = collected(out, teacher)
    return f"{table(found, teacher)}\n\n{differences(found)}"


if __name__ == "__main__":
    command("tail", __doc__, tables)
