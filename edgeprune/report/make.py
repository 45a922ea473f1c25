"""Makes the report of an artefact: measures it once, then writes the page and the model card.

`report.json` and `cache/report.npz` keep the measurements, so page and card can be rewritten, for example with the
figures of a bench.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tables import duration, interval_text, with_unit
from edgeprune.report import page
from edgeprune.report.measure import measure
from edgeprune.report.steps import ratio_text
from edgeprune.stages.distill import amount
from edgeprune.stages.options import halvings, seen
from edgeprune.stages.weights import check_pruned
from edgeprune.stages.work import Work, check_memory, report_images, reporting
from edgeprune.stages.workspace import Workspace

_SCHEMA = 3
"""Schema of report.json; a file with another one is measured again."""


def left_out(ws: Workspace, *, quick: bool = False) -> str:
    """Return why `compress` leaves out the report: it takes too long or too much memory; empty if it does not.

    Args:
        quick: draw few prompts.
    """
    if ws.manifest.choice and not ws.manifest.choice["images"]:
        return "no report: its images did not fit in --time"
    images, again = report_images(quick), f"edgeprune report -o {ws.out}"
    if not ws.world and ws.longest_s is not None:
        seconds = ws.speeds.seconds(work(ws, images))
        if seconds > ws.longest_s:
            fewer = max(1, int(images * ws.longest_s / seconds))
            return (
                f"no report: its {2 * images} images take at least {duration(seconds)} here; for fewer: {again} "
                f"--images {fewer}, for all: {again} --yes"
            )
    try:
        check_memory("the report", ws.memory.reporting(images), ws.original.compute)
    except InputError as error:
        return f"no report: {error}; make it with more --memory: {again}"
    return ""


def work(ws: Workspace, images: int, steps: int | None = None) -> Work:
    """Return the work of measuring a report with so many images of each model, of so many steps."""
    sizes = ws.plan()
    subject = replace(ws.subject, generation=seen(ws.generation, steps))
    own = replace(subject, generation=ws.student_generation)
    return reporting(subject, images, sizes.after.parameters / sizes.before.parameters, own.per_image)


def make_report(
    ws: Workspace,
    *,
    quick: bool = False,
    images: int | None = None,
    redo: bool = False,
    bench: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure unless that is done, write page and card, and return what was measured.

    Args:
        quick: draw few prompts.
        images: of each model that draws no shapes world; another number than was measured measures again. None keeps
            what was measured, else draws as many as `quick` says.
        redo: measure again.
        bench: the JSON of `edgeprune bench`, to show on the page.

    Raises:
        InputError: nothing is quantized yet, a teacher of shapes world is given a number of images, the bench is of
            another model, or measuring takes too long, see `Workspace.check_time`.
        StaleStageError: see `check_pruned`.
    """
    if ws.world and images is not None:
        raise InputError(f"--images {images}: a teacher of shapes world draws the same prompts of each task; omit it")
    ws.need("quantize", "report")
    if bench and ws.manifest.identity not in (variant.get("identity") for variant in bench["variants"]):
        names = ", ".join(variant["name"] for variant in bench["variants"])
        raise InputError(
            f"--bench: found {names}, none of which is {ws.out} as it is now; measure its export: edgeprune bench DIR"
        )
    path, images_path = ws.out / "report.json", ws.out / "cache" / "report.npz"
    done = path.is_file() and images_path.is_file() and not redo
    inputs = {"quantize": ws.manifest.stages["quantize"]["inputs"], "schema": _SCHEMA}
    choice, steps = ws.manifest.choice, None
    if choice and images is None:
        images, steps = None if ws.world else choice["images"] or None, choice["image_steps"]
    known, generation = read_json(path) if done else {}, seen(ws.generation, steps).to_json()
    same = known.get("inputs") == inputs and known.get("generation") == generation
    if same and images in (None, known.get("images")):
        summary, drawn = known, dict(np.load(images_path))
    else:
        check_pruned(ws)
        if not ws.world:
            _check_time(ws, images or report_images(quick), steps, progress)
        summary, drawn = measure(ws, quick, progress, images=images, steps=steps)
        summary["inputs"] = inputs
        images_path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # so that new images never stand with old figures
        temporary = images_path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **drawn)  # type: ignore[arg-type]
        temporary.replace(images_path)
        write_json(path, summary)
        shutil.rmtree(ws.cache / "report", ignore_errors=True)  # latents of unfinished images
    page.write(ws, summary, [("distillation", amount(ws)), *summary_rows(summary)], drawn, bench)
    return summary


def _check_time(ws: Workspace, images: int, steps: int | None, progress: Progress) -> None:
    """Say what measuring takes, and refuse what takes too long; see `Workspace.check_time`."""
    ways = [(f"--images {fewer}", work(ws, fewer, steps)) for fewer in halvings(images)]
    ws.check_time("report", work(ws, images, steps), ways, progress, memory=ws.memory.reporting(images))


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
            f"(median of pairs {ratio_text(summary['step_ratio'], summary.get('step_ratio_quartiles'))})",
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
