"""The study behind docs/analysis.md: estimators against the exhaustive protocol, and plans at equal size.

    python -m edgeprune.experiments.estimators -o build/analysis [--teacher rich-sd3] [--write docs/analysis.md]

Each estimator runs in its own process, so its peak memory is its own. OUT/found.json keeps the results, so an
interrupted study resumes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.stats import spearmanr

from edgeprune.analysis.contribution import Contribution, ContributionReport, Group, fingerprint, groups, removed
from edgeprune.analysis.estimators.exhaustive import Exhaustive
from edgeprune.analysis.estimators.gates import Gates
from edgeprune.analysis.estimators.reuse import Reuse
from edgeprune.artefact.resolve import read_config, resolve
from edgeprune.common.errors import EdgepruneError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.intervals import half_width
from edgeprune.common.splits import Split
from edgeprune.common.tables import interval_text
from edgeprune.experiments.pages import check_marks, insert
from edgeprune.experiments.teachers import TEACHERS, Teacher, add_option
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.make import make_plan
from edgeprune.stages.modulation import modulation_mean
from edgeprune.stages.prompts import prompts_of
from edgeprune.stages.workspace import Workspace

ONE_EACH = None
"""One caption per task to analyze on; each gives six states."""
FEW = 1
"""Captions for scoring pairs one by one."""
HELD_OUT = 2
"""Held-out captions of each task."""
DRAWS = 1000
BUDGETS = (0.79, 0.65)
"""Shares of the parameters that plans may keep."""
RUNS: dict[str, tuple[Any, dict[str, int], int | None, str]] = {
    "exhaustive": (Exhaustive, {}, ONE_EACH, "singles"),
    "reuse": (Reuse, {}, ONE_EACH, "singles"),
    "reuse, 1 caption": (Reuse, {}, 1, "singles"),
    "gates": (Gates, {"projections": 1}, ONE_EACH, "singles"),
    "gates, 4 projections": (Gates, {"projections": 4}, ONE_EACH, "singles"),
    "gates, 8 projections": (Gates, {"projections": 8}, ONE_EACH, "singles"),
    "joint: reuse": (Reuse, {}, ONE_EACH, "joint"),
    "joint: gates": (Gates, {"projections": 1}, ONE_EACH, "joint"),
    "pairs: reuse": (Reuse, {}, FEW, "pairs"),
    "pairs: gates": (Gates, {"projections": 1}, ONE_EACH, "pairs"),
}
"""By name: estimator, its options, number of captions, and what to score."""


def prepared(out: Path, teacher: Teacher, captions: list[str]) -> tuple[Any, VelocityError, torch.Tensor]:
    """Return the folder, the metric on these captions, and the mean modulation input (D)."""
    ws = Workspace(out / "model", teacher.model)
    metric = VelocityError(ws.pipe, ws.generation, captions, split=Split.ANALYSIS)
    return ws, metric, modulation_mean(ws, captions)


def groups_to_score(ws: Any, kind: str) -> list[Group]:
    """Return groups of parts to remove.

    Args:
        kind: `singles` for each part alone; `joint` for joint removals; `pairs` for single parts and pairs that plans
            may remove.
    """
    candidates = groups(ws.family, ws.config, joint=kind == "joint", pairs=kind == "pairs")
    last = ws.family.block_count(ws.config) - 2
    return {
        "singles": candidates,
        "joint": [parts for parts in candidates if len(parts) > 1],
        "pairs": [parts for parts in candidates if all(block < last for block, _ in parts)],
    }[kind]


def captions_of(teacher: Teacher, count: int | None) -> list[str]:
    """Return captions to analyze on."""
    grammar = teacher.world.grammar
    return prompts_of(Split.ANALYSIS, count or len(grammar.names), grammar)


def run_one(out: Path, teacher: Teacher, name: str) -> dict[str, Any]:
    """Return one run's scores, seconds, memory growth, and work in evaluations of the transformer."""
    kind, options, count, scored = RUNS[name]
    ws, metric, mean = prepared(out, teacher, captions_of(teacher, count))
    blocks, samples = ws.family.blocks(ws.pipe.transformer), [0]
    estimator = kind(ws.family, metric, mean, **options)

    def count_samples(_: Any, args: Any, kwargs: Any, __: Any) -> None:
        samples[0] += len(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_hook(count_samples, with_kwargs=True) for block in blocks]
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    scores = dict(estimator.estimate([(), *groups_to_score(ws, scored)]))
    seconds = time.perf_counter() - began
    for handle in handles:
        handle.remove()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    passes = 1 + options.get(
        "projections", 0
    )  # a backward pass without weight gradients costs about as much as a forward pass
    return {
        "captions": metric.count,
        "scores": [[list(parts), values] for parts, values in scores.items()],
        "seconds": seconds,
        "peak_over_before_bytes": max(0, peak - before),
        "evaluations": samples[0] * passes / len(blocks),
    }


def drops(run: dict[str, Any]) -> dict[Group, float]:
    """Return the mean loss by group."""
    return {tuple((b, c) for b, c in parts): -float(np.mean(s)) for parts, s in run["scores"] if parts}


def agreement(exact: dict[Group, float], estimate: dict[Group, float], seed: int = 0) -> tuple[float, float, float]:
    """Return Spearman's rank correlation with a bootstrap 95 % interval over groups."""
    both = np.array([(exact[parts], estimate[parts]) for parts in exact if parts in estimate])
    rng = np.random.default_rng(seed)
    values = [spearmanr(*both[rng.integers(0, len(both), len(both))].T)[0] for _ in range(DRAWS)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(spearmanr(*both.T)[0]), float(low), float(high)


class Study:
    """The results so far, and how to measure the rest."""

    def __init__(self, out: Path, teacher: Teacher) -> None:
        self.given, self.teacher, self.out = out, teacher, teacher.folder(out)
        self.path = self.out / "found.json"
        self.out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}

    def once(self, key: str, measure: Callable[[], Any]) -> None:
        """Measure `key` unless that is done."""
        if key not in self.results:
            self.results[key] = measure()
            write_json(self.path, self.results)
            print(f"{key}: done", flush=True)

    def run(self) -> None:
        """Measure everything that is not known yet."""
        for name in RUNS:
            self.once(name, lambda name=name: self.apart(name))  # type: ignore[misc]
        self.once("plans", self.plans)

    def apart(self, name: str) -> dict[str, Any]:
        """Return `run_one` of a new process."""
        command = [sys.executable, "-m", "edgeprune.experiments.estimators", "--teacher", self.teacher.name]
        command += ["-o", str(self.given), "--one", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def report(self, ws: Any, *names: str) -> ContributionReport:
        """Return one report that holds the scores of these runs."""
        runs = [self.results[name] for name in names]
        scores = {tuple((b, c) for b, c in parts): values for run in runs for parts, values in run["scores"] if parts}
        count = runs[0]["captions"]
        return ContributionReport(
            fingerprint=fingerprint(ws.config), family=ws.family.name, num_blocks=ws.family.block_count(ws.config),
            metric="velocity", prompts=captions_of(self.teacher, count),
            untouched=[0.0] * count, scores=scores,
        )  # fmt: skip

    def plans(self) -> list[dict[str, Any]]:
        """Return the velocity error on held-out captions of every method's plan at every budget."""
        ws, _, mean = prepared(self.out, self.teacher, captions_of(self.teacher, ONE_EACH))
        grammar = self.teacher.world.grammar
        count = HELD_OUT * len(grammar.names)
        held_out = VelocityError(
            ws.pipe, ws.generation, prompts_of(Split.HELD_OUT, count, grammar), split=Split.HELD_OUT
        )
        model = ws.pipe.transformer

        singles = self.report(ws, "exhaustive")
        methods: dict[str, tuple[str, ContributionReport]] = {
            "hpp": ("hpp", singles),
            "hybrid": ("hybrid", singles),
            "milp, no pairs": ("milp", singles),
            "milp, pairs by gates": ("milp", self.report(ws, "pairs: gates")),
            "milp, pairs by reuse": ("milp", self.report(ws, "pairs: reuse")),
        }
        out = []
        for keep in BUDGETS:
            for name, (method, report) in methods.items():
                began = time.perf_counter()
                row: dict[str, Any] = {"keep": keep, "method": name}
                try:
                    plan = make_plan(
                        ws.family, ws.config, report, method=method, keep=keep, protect_first=0,
                        threshold=0.0 if method == "hybrid" else 0.15,
                    )  # fmt: skip
                except EdgepruneError as error:
                    out.append(row | {"failed": str(error)})
                    continue
                row |= {"seconds": time.perf_counter() - began}
                with removed(ws.family, model, plan.keys, mean):
                    values = [-v for v in held_out.score()]
                row |= {"blocks": len(plan.blocks), "components": len(plan.components), "error": float(np.mean(values))}
                row |= {
                    "interval": half_width(values),
                    "int4_bytes": plan.after.int4_bytes,
                    "parameters": plan.after.parameters,
                }
                out.append(
                    row | {"parts": [str(Contribution(parts=(part,), drop=0.0, half_width=None)) for part in plan.keys]}
                )
                print(row, flush=True)
        return out


def tables(results: dict[str, Any], teacher: Teacher) -> str:
    """Return the tables between the marks of docs/analysis.md."""
    exact = drops(results["exhaustive"])
    joint = drops(results["joint: reuse"])
    lines = [
        "| estimator | evaluations | less | seconds | memory | Spearman, all parts | whole blocks | components |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (_, _, _, scored) in RUNS.items():
        if scored == "singles":
            run, got = results[name], drops(results[name])
            kinds = (exact, *({k: v for k, v in exact.items() if (k[0][1] is None) is w} for w in (True, False)))
            cells = [interval_text(agreement(kind, got)) for kind in kinds] if name != "exhaustive" else ["", "", ""]
            less = results["exhaustive"]["evaluations"] / run["evaluations"]
            lines.append(
                f"| {name} | {run['evaluations']:,.0f} | {less:.1f}x | {run['seconds']:.0f} | "
                f"{run['peak_over_before_bytes'] / 1e6:.0f} MB | {' | '.join(cells)} |"
            )
    lines += [
        "",
        f"Joint removals, `gates` against `reuse`: {interval_text(agreement(joint, drops(results['joint: gates'])))}",
    ]
    exact_pairs: dict[Group, float] = {k: v for k, v in drops(results["pairs: reuse"]).items() if len(k) == 2}
    pairs = interval_text(agreement(exact_pairs, drops(results["pairs: gates"])))
    lines[-1] += f"; {len(exact_pairs):,} pairs: {pairs}."
    lines += ["", "| kept | method | removed | INT4 | velocity error, held out | scored | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in results["plans"]:
        if "failed" in row:
            lines.append(f"| {row['keep']} | {row['method']} | {row['failed']} | | | | |")
            continue
        lines.append(
            f"| {row['parameters'] / _original_parameters(teacher):.3f} | {row['method']} | {row['blocks']} blocks, "
            f"{row['components']} components | {row['int4_bytes'] / 1e6:.2f} MB | "
            f"{row['error']:.3f} ± {row['interval']:.3f} | {row['scored']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _original_parameters(teacher: Teacher) -> float:
    from edgeprune.quantization.precision import footprint

    config, family = read_config(resolve(teacher.model))
    return footprint(family, family.tensor_shapes(config)).parameters


def main() -> None:
    """Read the command line; measure one run, or run the study and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.estimators", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/analysis"))
    parser.add_argument("--one", choices=RUNS, help="measure only this run; prints JSON on the last line")
    parser.add_argument("--write", type=Path, help="a page whose tables to replace")
    add_option(parser)
    args = parser.parse_args()
    teacher = TEACHERS[args.teacher]
    try:
        if args.one:
            print(json.dumps(run_one(teacher.folder(args.out), teacher, args.one)))
            return
        if args.write:
            check_marks(args.write, teacher.named("measured"))
        study = Study(args.out, teacher)
        study.run()
        text = tables(study.results, teacher)
        if args.write:
            insert(args.write, text.rstrip("\n"), teacher.named("measured"))
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")
    print(text)


if __name__ == "__main__":
    main()
