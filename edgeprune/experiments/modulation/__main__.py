"""Runs the study and writes `tables.md` and `modulation.svg`; an interrupted run resumes from `study.json`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import EdgepruneError
from edgeprune.experiments.modulation.errors import ERRORS, ranks, seen
from edgeprune.experiments.modulation.plot import plot
from edgeprune.experiments.modulation.sizes import judge_variant, judged, measure_variant, variants
from edgeprune.experiments.modulation.study import Study, print_progress
from edgeprune.experiments.modulation.tables import tables
from edgeprune.experiments.teachers import TEACHERS, add_option
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.options import AnalyzeOptions

SEED = 7


def run(study: Study) -> None:
    """Measure everything that is not known yet."""
    run_analyze(study.base, AnalyzeOptions(), print_progress)
    report = ContributionReport.load(study.base.report_path)
    drops = [c.drop for c in report.contributions().values() if c.component is None]
    study.once("blocks", lambda: {"least": min(drops), "median": float(np.median(drops)), "most": max(drops)})
    study.once("ranks", functools.partial(ranks, study))
    for name, variant in variants().items():
        if not variant.distilled:
            study.once(f"variant {name}", functools.partial(measure_variant, study, name, variant))
    for key, measure in ERRORS.items():
        if key == "guidance" and not study.guided:  # its scale is an input
            continue
        study.once(key, functools.partial(measure, study))
    study.once("images teacher", lambda: judged(study, "teacher", study.teacher))
    study.once("images float32-16", lambda: judged(study, "float32-16", study.thin(16)))
    study.once("seen", functools.partial(seen, study))
    for name, variant in variants().items():
        study.once(f"variant {name}", functools.partial(measure_variant, study, name, variant))
        study.once(f"images {name}", functools.partial(judge_variant, study, name, variant))


def main() -> None:
    """Read the command line, run the study and write its tables and plot."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.modulation", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/modulation"))
    parser.add_argument("--per-task", type=int, default=10, help="held-out captions of each task")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each distillation")
    add_option(parser)
    args = parser.parse_args()
    teacher = TEACHERS[args.teacher]
    out = teacher.folder(args.out)
    torch.manual_seed(SEED)
    try:
        study = Study(out, teacher, per_task=args.per_task, steps=args.steps)
        run(study)
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")
    (out / "tables.md").write_text(tables(study.results), encoding="utf-8")
    plot(study.results, out / "modulation.svg")
    print(f"wrote {out / 'tables.md'} and modulation.svg")


if __name__ == "__main__":
    main()
