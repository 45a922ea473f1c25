"""The table of docs/int4.md: what each choice of integers loses, on a teacher.

    python -m edgeprune.experiments.integers -o build/integers [--teacher rich-sd3] [--write docs/int4.md]

Nothing is removed and nothing trained, so that all of the error is that of the integers. An interrupted run resumes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.artefact.loading import load_transformer
from edgeprune.common.files import read_json, write_json
from edgeprune.common.intervals import mean_interval
from edgeprune.common.tables import duration, interval_text, markdown_table
from edgeprune.experiments.held_out import Held
from edgeprune.experiments.pages import command
from edgeprune.experiments.teachers import Teacher
from edgeprune.planning.options import PlanOptions
from edgeprune.quantization.quantize import CALIBRATIONS
from edgeprune.stages import plan, prune, quantize
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.workspace import Workspace

COUNTS = (1, 4, quantize.PROMPTS)
"""Captions that calibrate."""


def options() -> Iterator[QuantizeOptions]:
    """Yield what is compared."""
    for calibration in CALIBRATIONS:
        for count in COUNTS if calibration == "feedback" else COUNTS[-1:]:
            yield QuantizeOptions(calibration=calibration, count=count if calibration != "none" else None)


def measure(out: Path, teacher: Teacher) -> list[dict[str, Any]]:
    """Return a row for each of `options`."""
    ws, path = Workspace(out / "model", teacher.model), out / "found.json"
    plan.run(ws, PlanOptions("manual", blocks=""))
    prune.run(ws)
    held = Held(ws)
    found: list[dict[str, Any]] = read_json(path)["rows"] if path.is_file() else []
    for chosen in options():
        if any(row["options"] == chosen.to_json() for row in found):
            continue
        began = time.perf_counter()
        quantize.run(Workspace(ws.out, teacher.model, fresh=True), chosen)
        seconds = time.perf_counter() - began
        model = load_transformer(ws.out, quantized=True)
        found.append({"options": chosen.to_json(), "seconds": seconds} | held.measure(model))
        write_json(path, {"rows": found})
        print(found[-1]["options"], np.mean(found[-1]["error"]), flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows of `measure` in Markdown."""
    head = (
        "`--calibration`",
        "captions",
        "velocity error",
        "PSNR to the original's images, dB",
        "more than `none`",
        "time",
    )
    nearest, rows = found[0]["decibels"], []
    for row in found:
        more = mean_interval([one - other for one, other in zip(row["decibels"], nearest, strict=True)])
        rows.append(
            (
                row["options"]["calibration"],
                str(row["options"].get("count", "")),
                interval_text(mean_interval(row["error"]), ".4f"),
                interval_text(mean_interval(row["decibels"]), ".1f"),
                interval_text(more, "+.1f") if row is not found[0] else "",
                duration(row["seconds"]),
            )
        )
    return markdown_table(head, rows)


if __name__ == "__main__":
    command("integers", __doc__, lambda *given: table(measure(*given)))
