"""The table of docs/run.md: what solvers and ranges of guidance lose at fewer evaluations, on a teacher.

    python -m edgeprune.experiments.solvers [-o build/solvers] [--teacher rich-sd3] [--write docs/run.md]

Images of held-out captions are compared with those of the same noise in EXACT steps of UniPC with guidance throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeprune.common.intervals import mean_interval
from edgeprune.common.splits import Split
from edgeprune.common.tables import interval_text, markdown_table
from edgeprune.experiments.pages import command
from edgeprune.experiments.teachers import Teacher
from edgeprune.metrics.psnr import decibels
from edgeprune.sampling.denoising import generate, latent_shape, sigmas
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.solvers import SOLVERS
from edgeprune.stages.workspace import Workspace

EXACT = 100
PER_TASK = 4
"""Held-out captions of each task."""
STEPS = (6, 8, 10, 14)
RANGES = ((0.0, 1.0), (0.5, 1.0))


def settings(own: Generation, *, guided: bool) -> Iterator[Generation]:
    """Yield what is compared: the model's own settings first."""
    yield own
    for guidance_range in RANGES if guided else RANGES[:1]:
        for solver in SOLVERS:
            for steps in STEPS:
                chosen = replace(own, num_inference_steps=steps, solver=solver, guidance_range=guidance_range)
                if chosen != own:
                    yield chosen


def table(out: Path, teacher: Teacher) -> str:
    """Draw and compare; return the table in Markdown."""
    ws, world = Workspace(out, teacher.model), teacher.world
    pipe, prompts = ws.pipe, world.grammar.evaluation_prompts(PER_TASK)
    captions, tasks = [p.text for p in prompts], [p.meaning.task for p in prompts]
    seeds, own = Split.HELD_OUT.seeds(len(captions)), ws.generation
    exact = generate(pipe, captions, seeds, replace(own, num_inference_steps=EXACT, solver="unipc"))
    lines = []
    for chosen in settings(own, guided=teacher.guided):
        images = generate(pipe, captions, seeds, chosen)
        levels = sigmas(pipe, chosen, latent_shape(pipe, chosen))[:-1].tolist()
        evaluations = sum(1 + (teacher.guided and chosen.guides(level)) for level in levels)
        psnr = [decibels(a, b) for a, b in zip(exact, images, strict=True)]
        right = [float(world.check(image, p.meaning)) for image, p in zip(images, prompts, strict=True)]
        low, high = chosen.guidance_range
        lines.append([
            chosen.solver, str(chosen.num_inference_steps), f"{low:g} to {high:g}", str(evaluations),
            interval_text(mean_interval(psnr), ".1f"), interval_text(mean_interval(right, tasks)),
            f"{np.quantile(psnr, 0.05):.1f}",
        ])  # fmt: skip
        print(lines[-1], flush=True)
    head = ["`--solver`", "`--steps`", "guidance at", "evaluations", "PSNR to the exact, dB", "score", "worst 5 %, dB"]
    return markdown_table(head, lines)


if __name__ == "__main__":
    command("solvers", __doc__, table)
