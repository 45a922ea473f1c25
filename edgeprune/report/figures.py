"""What a report on an artefact says, measured when it is made: images at the same seeds, quality, memory, latency.

Measurements are kept in `report.json`, so that page and model card (report_page.py) can be written again, with the
figures of a bench. What it leaves out: measuring devices (bench.py).
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from edgeprune import shapes
from edgeprune.artefact import checkpoint
from edgeprune.artefact.checkpoint import INT4
from edgeprune.bench.measure import show
from edgeprune.common.files import read_json, write_json
from edgeprune.common.intervals import Interval, mean_interval, paired_drop
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.report import page as report_page
from edgeprune.sampling.denoising import encode_prompts, generate, latent_shape, noise, velocity
from edgeprune.sampling.prompts import PROMPTS, read_prompts
from edgeprune.stages.pipeline import Progress, Workspace, silent

_SCHEMA = 2
"""Of report.json: one of another is measured again."""


def memory_short(ws: Workspace) -> str:
    """Why this machine cannot make the page, whose images take both models in float32; empty if it can."""
    plan = ws.plan()
    needed = 2 * (plan.before.bf16_bytes + plan.after.bf16_bytes)
    available = psutil.virtual_memory().available
    if needed < available:
        return ""
    return (
        f"no report: its images take {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free; "
        f"make it on a larger machine: edgeprune report -o {ws.out}"
    )


def make(
    ws: Workspace,
    *,
    quick: bool = False,
    redo: bool = False,
    bench: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure (unless that is done and `redo` is False) and write the page; returns what was measured."""
    ws.need("quantize", "report")
    path, images_path = ws.out / "report.json", ws.out / "cache" / "report.npz"
    done = path.is_file() and images_path.is_file() and not redo
    inputs = {"quantize": ws.manifest.stages["quantize"]["inputs"], "schema": _SCHEMA}
    if done and read_json(path).get("inputs") == inputs:
        summary, images = read_json(path), dict(np.load(images_path))
    else:
        summary, images = _measure(ws, quick, progress)
        summary["inputs"] = inputs
        images_path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # else new images could stand beside old figures
        temporary = images_path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **images)  # type: ignore[arg-type]
        temporary.replace(images_path)
        write_json(path, summary)
    report_page.write(ws, summary, rows(summary), images, bench)
    return summary


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The measurements as short lines."""
    out = [
        (
            "transformer weights",
            f"{show('_bytes', summary['original_bf16_bytes'])} bf16 -> "
            f"{show('_bytes', summary['compressed_int4_bytes'])} INT4 ({summary['weights_ratio']:.1%})",
        ),
        (
            "one step in torch, fp32, without INT4",
            f"{show('_s', summary['original_step_s'])} -> {show('_s', summary['pruned_step_s'])} "
            f"({summary['step_ratio']:.2f}x)",
        ),
        ("PSNR to the original's images", f"{summary['psnr_db']:.1f} dB, {summary['images']} images at equal seeds"),
    ]
    if summary.get("quality"):
        q = summary["quality"]
        out.append(
            (
                "score, held-out prompts, 95 % interval",
                f"{_interval(q['original'])} -> {_interval(q['compressed'])}"
                + (", relative drop {:.1%} [{:.1%}, {:.1%}]".format(*q["relative_drop"]) if q["relative_drop"] else ""),
            )
        )
    return out


def _interval(values: list[float]) -> str:
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def _measure(ws: Workspace, quick: bool, progress: Progress) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if ws.builtin:
        chosen = shapes.evaluation_prompts(2 if quick else 15)
        texts, meanings = [p.text for p in chosen], [p.meaning for p in chosen]
    else:
        texts, meanings = read_prompts(PROMPTS)[: 2 if quick else 8], []
    seeds = list(range(len(texts)))
    original = ws.pipe.transformer
    int4 = checkpoint.load_transformer(ws.out, quantized=True)
    images: dict[str, NDArray[Any]] = {}
    for name, transformer in (("original", original), ("compressed", int4)):
        ws.pipe.transformer = transformer
        shown = functools.partial(_show_images, progress, name)
        images[name] = generate(ws.pipe, texts, seeds, ws.generation, progress=shown)
    ws.pipe.transformer = original
    pruned = checkpoint.load_transformer(ws.out, quantized=False)
    times = step_times(ws, [original, pruned])
    stored = sum(p.stat().st_size for p in (ws.out / INT4).glob("*.safetensors"))
    before = ws.plan().before.bf16_bytes
    summary: dict[str, Any] = {
        "prompts": texts,
        "images": len(texts),
        "original_bf16_bytes": before,
        "compressed_int4_bytes": stored,
        "weights_ratio": stored / before,
        "original_step_s": times[0],
        "pruned_step_s": times[1],
        "step_ratio": times[1] / times[0],
        "psnr_db": mean_decibels(list(images["original"]), list(images["compressed"])),
        "generation": vars(ws.generation),
    }
    if meanings:
        passed = {
            k: np.asarray([float(shapes.check(i, m)) for i, m in zip(v, meanings, strict=True)])
            for k, v in images.items()
        }
        tasks = [m.task for m in meanings]
        summary["quality"] = {
            "metric": "shapes world, mean over tasks",
            "original": shapes.score(passed["original"], tasks),
            "compressed": shapes.score(passed["compressed"], tasks),
            "relative_drop": paired_drop(passed["original"], passed["compressed"], tasks).relative,
            "tasks": {k: _by_task(v, tasks) for k, v in passed.items()},
        }
    return summary, images


def _by_task(values: NDArray[Any], tasks: list[str]) -> dict[str, Interval]:
    return {t: mean_interval(values[np.asarray(tasks) == t]) for t in dict.fromkeys(tasks)}


def _show_images(progress: Progress, name: str, done: int, total: int) -> None:
    progress(f"report: images, {name}", done, total, "")


@torch.no_grad()
def step_times(ws: Workspace, models: list[Any], repeats: int = 9) -> list[float]:
    """Median seconds of one guided step of each model, taken in turns so that a busy machine is busy for all."""
    c = encode_prompts(ws.pipe, ["", "a red circle"], ws.generation.max_sequence_length)
    x = noise([0, 0], latent_shape(ws.pipe, ws.generation))
    sigma, guidance = torch.full((2,), 0.5), ws.generation.guidance_scale
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, found in zip(models, times, strict=True):
            start = time.perf_counter()
            velocity(model, x, c, sigma, guidance)
            if repeat:
                found.append(time.perf_counter() - start)
    return [float(np.median(t)) for t in times]
