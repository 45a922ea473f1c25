"""The table of docs/stand-ins.md: what maps in place of removed blocks win back, on a teacher.

    python -m edgeprune.experiments.stand_ins -o build/stand-ins [--teacher rich-sd3] [--write docs/stand-ins.md]

Nothing is trained. An interrupted run resumes. docs/stand-ins.json, or the file of another teacher, keeps
the figures of each caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.surgery import build, prune_state
from edgeprune.common.files import digest, read_json, write_json
from edgeprune.common.progress import silent
from edgeprune.common.tables import markdown_table
from edgeprune.experiments import held_out
from edgeprune.experiments.held_out import Held
from edgeprune.experiments.pages import command
from edgeprune.experiments.teachers import Teacher
from edgeprune.planning.options import QUARTER, PlanOptions
from edgeprune.stages import plan, prune, quantize, stand_ins
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.stand_ins import LARGE_STATES, PROMPTS
from edgeprune.stages.weights import original_weights
from edgeprune.stages.workspace import Workspace

PER_TASK = 10
"""Held-out captions of each task."""
FEW = 4
"""Captions that are too few."""

RESULTS = Path("docs/stand-ins.json")
_VALUES = [name for name, _ in held_out.MEASURED.values()]


@dataclass(frozen=True)
class Row:
    """What is compared."""

    blocks: str
    stand_in: int | str | None
    prompts: int = PROMPTS
    states: int | None = None
    int4: bool = False

    @property
    def key(self) -> str:
        """A name that no other row has."""
        return f"{self.blocks}/{self.stand_in}/{self.prompts}/{self.states}/{self.int4}"


def rows(teacher: Teacher) -> Iterator[Row]:
    """Yield what is compared: the first of its blocks in more ways, also by maps of all directions."""
    first = teacher.blocks[0]
    for blocks in teacher.blocks:
        for stand_in in (None, teacher.width // 8, QUARTER, teacher.width) if blocks == first else (None, QUARTER):
            yield Row(blocks, stand_in)
    for prompts in (PROMPTS, FEW):
        yield Row(first, QUARTER, prompts, LARGE_STATES)
    for stand_in in (None, QUARTER):
        yield Row(first, stand_in, int4=True)


def measure(out: Path, teacher: Teacher) -> dict[str, dict[str, Any]]:
    """Return the figures of each of `rows`, by its key."""
    path, held = out / "found.json", None
    found: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    for row in rows(teacher):
        if row.key in found:
            continue
        ws = Workspace(out / "model", teacher.model, fresh=True)
        held = held or Held(Workspace(out / "original", teacher.model), PER_TASK)
        values = held.measure(made(ws, row))
        found[row.key] = {"tasks": held.tasks} | {n: [round(value, 4) for value in values[n]] for n in values}
        write_json(path, found)
        print(row.key, found[row.key]["error"][0], flush=True)
    return found


def made(ws: Workspace, row: Row) -> Any:
    """Return the pruned model of a row."""
    plan.run(ws, PlanOptions("manual", blocks=row.blocks, stand_in=row.stand_in))
    chosen = ws.plan()
    if row.int4:
        prune.run(ws)
        quantize.run(ws, QuantizeOptions(calibration="none"))
        return load_transformer(ws.out, quantized=True)
    maps = {}
    if chosen.stand_ins:
        prompts = stand_ins.prompts_of_fit(ws)[: row.prompts]
        maps = stand_ins.fit(ws, chosen, prompts, digest(row.key), silent, most=row.states)
    state = prune_state(ws.family, ws.config, chosen, original_weights(ws).__getitem__, None, stand_ins=maps)
    return build(ws.family, ws.config, chosen, {name: tensor.float() for name, tensor in state.items()})


def table(found: dict[str, dict[str, Any]], teacher: Teacher) -> str:
    """Return the rows of `measure` in Markdown."""
    lines, width = [], teacher.width
    for row in rows(teacher):
        values = found[row.key]
        states = f" x {row.states} states" if row.states else ""
        fitted = f"{row.prompts} captions{states}" if row.stand_in else ""
        names = {None: "none", QUARTER: f"{width // 4}, a quarter", width: f"{width}, all"}
        lines.append(
            (
                row.blocks, names.get(row.stand_in, str(row.stand_in)), fitted, "INT4" if row.int4 else "float32",
                *held_out.cells([values]),
            )
        )  # fmt: skip
    return markdown_table(("removed", "rank", "fitted on", "weights", *_VALUES), lines)


def contrasts(teacher: Teacher) -> Iterator[tuple[str, Row, Row]]:
    """Yield each comparison: its name, a row, and the row to subtract from it."""
    for blocks in teacher.blocks:
        yield f"{blocks}: a quarter less none", Row(blocks, QUARTER), Row(blocks, None)
    first = teacher.blocks[0]
    few = Row(first, QUARTER, FEW, LARGE_STATES)
    yield f"{first}: all less a quarter", Row(first, teacher.width), Row(first, QUARTER)
    yield f"{first}: {FEW} captions less none", few, Row(first, None)
    yield f"{first}, INT4: a quarter less none", Row(first, QUARTER, int4=True), Row(first, None, int4=True)


def differences(found: dict[str, dict[str, Any]], teacher: Teacher) -> str:
    """Return the differences of rows in Markdown, paired by caption."""
    lines = [(name, *held_out.differences([(found[a.key], found[b.key])])) for name, a, b in contrasts(teacher)]
    return markdown_table(("difference", *_VALUES), lines)


def tables(out: Path, teacher: Teacher) -> str:
    """Measure and return both tables, and keep what they are made of in RESULTS, or in the file of another teacher."""
    found = measure(out, teacher)
    write_json(teacher.results(RESULTS), found)
    return f"{table(found, teacher)}\n\n{differences(found, teacher)}"


if __name__ == "__main__":
    command("stand_ins", __doc__, tables)
