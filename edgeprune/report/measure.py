"""Measures an artefact against its original: images at the same seeds, quality, bytes and step time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import INT4
from edgeprune.common.files import digest
from edgeprune.common.intervals import Interval, mean_interval, paired_drop
from edgeprune.common.progress import Progress
from edgeprune.common.splits import Split
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.report.steps import step_times
from edgeprune.residency.compute import name_of
from edgeprune.residency.running import running
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import is_streamed, release
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import prompts
from edgeprune.shapes import Meaning, World, score
from edgeprune.stages.options import seen
from edgeprune.stages.weights import open_pruned
from edgeprune.stages.work import report_images, shapes_per_task
from edgeprune.stages.workspace import Workspace


def measure(
    ws: Workspace, quick: bool, progress: Progress, *, images: int | None = None, steps: int | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the summary that report.json keeps, and the images of `original` and `compressed`, each (P, H, W, 3).

    ReportFigures in api/compressing.py names the summary's fields.

    Prompts and seeds are held out: nothing that made the artefact has seen them.

    Args:
        quick: draw few prompts.
        images: of each model that draws no shapes world; None draws as many as `quick` says.
        steps: of an image; None for the model's own.
    """
    generations = {"original": seen(ws.generation, steps), "compressed": seen(ws.student_generation, steps)}
    if ws.world:
        chosen = ws.world.grammar.evaluation_prompts(shapes_per_task(quick))
        texts, meanings = [p.text for p in chosen], [p.meaning for p in chosen]
    else:
        texts, meanings = prompts(Split.HELD_OUT, images or report_images(quick)), list[Meaning]()
    seeds = Split.HELD_OUT.seeds(len(texts))
    original = ws.pipe.transformer
    compute = ws.original.compute
    drawn: dict[str, NDArray[Any]] = {}
    for name, generation in generations.items():
        if name == "compressed":  # of large models one at a time has room
            release(original)
            ws.pipe.transformer = running(open_transformer(ws.out, quantized=True), compute)
        drawn[name] = generate(
            ws.pipe, texts, seeds, generation, spill=_kept(ws, name, len(texts), generation),
            progress=lambda _, *counts, name=name: progress(f"report: steps of images, {name}", *counts),
        )  # fmt: skip
    release(ws.pipe.transformer)
    ws.pipe.transformer = original
    streamed = is_streamed(ws.family.blocks(original)[0])
    # Neither model keeps blocks now, so that both are timed alike.
    pruned = running(open_pruned(ws), compute, keep=False)
    times = step_times(ws, original, pruned)
    stored = sum(p.stat().st_size for p in (ws.out / INT4).glob("*.safetensors"))
    before = ws.plan().before.bf16_bytes
    summary: dict[str, Any] = {
        "prompts": texts,
        "seeds": seeds,
        "images": len(texts),
        "original_bf16_bytes": before,
        "compressed_int4_bytes": stored,
        "weights_ratio": stored / before,
        "original_step_s": times.first_s,
        "pruned_step_s": times.other_s,
        "step_dtype": name_of(ws.original.dtype) + (", from one block of each kind" if streamed else ""),
        "step_ratio": times.ratio,
        "step_ratio_quartiles": times.quartiles,
        "psnr_db": mean_decibels(list(drawn["original"]), list(drawn["compressed"])),
        "generation": generations["original"].to_json(),
    }
    if ws.world:
        summary["quality"] = _quality(drawn, meanings, ws.world)
    return summary, drawn


def _quality(images: dict[str, NDArray[Any]], meanings: list[Meaning], world: World) -> dict[str, Any]:
    passed = {
        k: np.asarray([float(world.check(i, m)) for i, m in zip(v, meanings, strict=True)]) for k, v in images.items()
    }
    tasks = [m.task for m in meanings]
    return {
        "metric": "shapes world, mean over tasks",
        "original": score(passed["original"], tasks),
        "compressed": score(passed["compressed"], tasks),
        "relative_drop": paired_drop(passed["original"], passed["compressed"], tasks).relative,
        "tasks": {k: _by_task(v, tasks) for k, v in passed.items()},
    }


def _by_task(values: NDArray[Any], tasks: list[str]) -> dict[str, Interval]:
    passed = {t: values[np.asarray(tasks) == t] for t in dict.fromkeys(tasks)}
    return {t: mean_interval(hits, [t] * len(hits)) for t, hits in passed.items()}


def _kept(ws: Workspace, name: str, count: int, generation: Generation) -> Spill | None:
    """Return where the latents of a large model's images are kept after each step; None for a small one."""
    if not is_streamed(ws.family.blocks(ws.pipe.transformer)[0]):
        return None
    made, where = ws.manifest.stages["quantize"]["inputs"], f"{ws.original.dtype} {ws.original.compute.device.type}"
    return Spill(ws.cache / "report" / name, identity=digest([made, count, generation.to_json(), where]))
