"""The section of docs/analysis.md on guidance: are parts ranked alike by the conditional and by the guided velocity?

    python -m edgeprune.experiments.guidance -o build/guidance [--teacher rich-sd3] [--write docs/analysis.md]

It ranks with captions of the analysis split; errors are of held-out captions. The guided velocity at scale s is
u + s (c - u), where c has the prompt and u has none, so a teacher that takes the scale as an input is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from edgeprune.analysis.contribution import ContributionReport, Group, fingerprint, groups, removed
from edgeprune.artefact.surgery import prune
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.splits import Split
from edgeprune.experiments.pages import check_marks, insert
from edgeprune.experiments.teachers import TEACHERS, Teacher, add_option
from edgeprune.metrics.velocity import VelocityError, squares
from edgeprune.planning.make import make_plan
from edgeprune.sampling.denoising import encode_prompts, velocity
from edgeprune.shapes import World
from edgeprune.stages.modulation import modulation_mean
from edgeprune.stages.workspace import Workspace

SCALES = (1.0, 2.0, 4.0, 7.0)
"""1 is the conditional velocity, which `analyze` measures; 2 is the teachers' own scale."""
PLANS: dict[str, dict[str, Any]] = {
    f"{what}, {keep}": {"keep": keep, "protect_first": 0, **options}
    for what, options in (("blocks", {"method": "hpp"}), ("components", {"method": "hybrid", "threshold": 0.0}))
    for keep in (0.75, 0.5)
}


class Guided:
    """The relative error of the velocity at every scale, on one caption of each task."""

    def __init__(self, ws: Workspace, world: World, split: Split) -> None:
        self.captions = [p.text for p in world.grammar.evaluation_prompts(1, split=split)]
        self.metric = VelocityError(ws.pipe, ws.generation, self.captions, split=split)
        empty = encode_prompts(ws.pipe, [""], ws.generation.max_sequence_length)
        self.conditions = self.metric.condition, empty[[0] * len(self.metric.states)]
        self.reference = self._both(ws.teacher)

    @torch.no_grad()
    def _both(self, model: Any) -> list[torch.Tensor]:
        m = self.metric
        starts = range(0, len(m.states), m.batch)
        rows = [slice(start, start + m.batch) for start in starts]
        return [
            torch.cat([velocity(model, m.states[r], condition[r], m.sigmas[r], m.guidance) for r in rows])
            for condition in self.conditions
        ]

    def errors(self, model: Any) -> dict[float, list[float]]:
        """Return the error of each caption by scale."""
        out, found = {}, self._both(model)
        for scale in SCALES:
            target, result = (u + scale * (c - u) for c, u in (self.reference, found))
            off = self.metric.per_prompt(squares(result - target)) / self.metric.per_prompt(squares(target))
            out[scale] = [float(error) for error in off]
        return out


def measure(out: Path, teacher: Teacher) -> str:
    """Return the section's two tables.

    Raises:
        InputError: the teacher is not guided by a second evaluation.
    """
    if not teacher.guided:
        raise InputError(f"--teacher {teacher.name}: takes the guidance scale as an input; expected one that is guided")
    ws = Workspace(out / "model", teacher.model)
    analysis, held_out = (Guided(ws, teacher.world, split) for split in (Split.ANALYSIS, Split.HELD_OUT))
    mean = modulation_mean(ws, analysis.captions)
    scores: dict[float, dict[Group, list[float]]] = {scale: {} for scale in SCALES}
    for parts in groups(ws.family, ws.config):
        with removed(ws.family, ws.teacher, parts, mean):
            for scale, errors in analysis.errors(ws.teacher).items():
                scores[scale][parts] = [-error for error in errors]
    lines = ["| ranked at scale | Spearman with scale 1, all parts | whole blocks | components | error, of scale 1's |"]
    lines.append("| --- | --- | --- | --- | --- |")
    losses = {scale: np.asarray([-np.mean(s) for s in scores[scale].values()]) for scale in SCALES}
    whole = np.asarray([parts[0][1] is None for parts in scores[1.0]])
    for scale in SCALES[1:]:
        both = losses[1.0], losses[scale]
        cells = [f"{spearmanr(*(x[which] for x in both))[0]:.3f}" for which in (whole | ~whole, whole, ~whole)]
        lines.append(f"| {scale:g} | {' | '.join(cells)} | {both[1].mean() / both[0].mean():.2f} times |")
    lines += [
        "",
        "| plan | ranked at scale | parts in common | " + " | ".join(f"error at {s:g}" for s in SCALES) + " |",
    ]
    lines.append("| --- | --- | --- |" + " --- |" * len(SCALES))
    for name, options in PLANS.items():
        first: frozenset[Any] = frozenset()
        for scale in SCALES:
            report = ContributionReport(
                fingerprint(ws.config), ws.family.name, ws.family.block_count(ws.config), "velocity",
                analysis.captions, [0.0] * len(analysis.captions), scores[scale],
            )  # fmt: skip
            plan = make_plan(ws.family, ws.config, report, **options)
            chosen = frozenset(plan.keys)
            first = first or chosen
            small = prune(ws.family, ws.teacher, ws.config, plan, mean, torch.zeros(1, len(mean)))
            cells = [f"{np.mean(errors):.3f}" for errors in held_out.errors(small).values()]
            lines.append(f"| {name} | {scale:g} | {len(chosen & first)} of {len(first)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, and print or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.guidance", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/guidance"))
    parser.add_argument("--write", type=Path, help="a page whose tables to replace")
    add_option(parser)
    args = parser.parse_args()
    teacher = TEACHERS[args.teacher]
    try:
        if args.write:
            check_marks(args.write, teacher.named("guidance"))
        text = measure(teacher.folder(args.out), teacher)
        if args.write:
            insert(args.write, text, teacher.named("guidance"))
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")
    print(text)


if __name__ == "__main__":
    main()
