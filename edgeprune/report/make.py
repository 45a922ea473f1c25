"""Makes the report of an artefact: measures it once, then writes the page and the model card.

`report.json` and `cache/report.npz` keep the measurements, so page and card can be rewritten, for example with the
figures of a bench.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from edgeprune.common.files import read_json, write_json
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tables import duration, interval_text, with_unit
from edgeprune.report import page
from edgeprune.report.measure import images_of, measure
from edgeprune.report.steps import ratio_text
from edgeprune.stages.costs import evaluation_seconds, evaluations_per_step
from edgeprune.stages.distill import amount
from edgeprune.stages.workspace import Workspace

_SCHEMA = 3
"""Schema of report.json; a file with another one is measured again."""
_LONGEST_HOURS = 1.0
"""A report that takes longer is made only on request."""


def takes_long(ws: Workspace, *, quick: bool = False) -> str:
    """Return why `compress` leaves out the report: its images would take over an hour here; empty if they would not.

    Args:
        quick: draw few prompts.
    """
    family, config = ws.family, ws.config
    if ws.builtin:
        return ""
    evaluations = 2 * images_of(quick) * ws.generation.num_inference_steps
    evaluations *= evaluations_per_step(family, config, ws.generation)
    one = evaluation_seconds(family, config, ws.source, ws.generation, ws.original.compute)
    hours = evaluations * one / 3600
    if hours < _LONGEST_HOURS:
        return ""
    return (
        f"no report: its {2 * images_of(quick)} images take at least {duration(hours * 3600)} here; make it on a "
        f"faster machine, or anyway: edgeprune report -o {ws.out}"
    )


def make_report(
    ws: Workspace,
    *,
    quick: bool = False,
    redo: bool = False,
    bench: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure unless that is done, write page and card, and return what was measured.

    Args:
        quick: draw few prompts.
        redo: measure again.
        bench: the JSON of `edgeprune bench`, to show on the page.
    """
    ws.need("quantize", "report")
    path, images_path = ws.out / "report.json", ws.out / "cache" / "report.npz"
    done = path.is_file() and images_path.is_file() and not redo
    inputs = {"quantize": ws.manifest.stages["quantize"]["inputs"], "schema": _SCHEMA}
    if done and read_json(path).get("inputs") == inputs:
        summary, images = read_json(path), dict(np.load(images_path))
    else:
        summary, images = measure(ws, quick, progress)
        summary["inputs"] = inputs
        images_path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # so that new images never stand with old figures
        temporary = images_path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **images)  # type: ignore[arg-type]
        temporary.replace(images_path)
        write_json(path, summary)
        shutil.rmtree(ws.cache / "report", ignore_errors=True)  # latents of unfinished images
    page.write(ws, summary, [("distillation", amount(ws)), *summary_rows(summary)], images, bench)
    return summary


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the measurements as label and text."""
    out = [
        (
            "transformer weights",
            f"{with_unit('_bytes', summary['original_bf16_bytes'])} bf16 -> "
            f"{with_unit('_bytes', summary['compressed_int4_bytes'])} INT4 ({summary['weights_ratio']:.1%})",
        ),
        (
            f"one step in torch, {summary.get('step_dtype', 'fp32')}, without INT4",
            f"{with_unit('_s', summary['original_step_s'])} -> {with_unit('_s', summary['pruned_step_s'])} "
            f"({ratio_text(summary['step_ratio'], summary.get('step_ratio_quartiles'))}x)",
        ),
        ("PSNR to the original's images", f"{summary['psnr_db']:.1f} dB, {summary['images']} images at equal seeds"),
    ]
    if quality := summary.get("quality"):
        drop = quality["relative_drop"]
        out.append(
            (
                "score, held-out prompts, 95 % interval",
                f"{interval_text(quality['original'])} -> {interval_text(quality['compressed'])}"
                + (f", relative drop {interval_text(drop, '.1%')}" if drop else ""),
            )
        )
    return out
