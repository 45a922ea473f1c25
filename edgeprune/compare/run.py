"""Runs a grid: compresses by every row with several seeds, and scores against the original on the same prompts.

    grid = Grid.load(grid_named("demo"), preset("default", builtin=True))
    compare(Workspace(out / "original", None), grid, "shapes", prompts, out)

Every run is a folder `OUT/<row>/seed-<n>`, made by the stages of `compress`. Finished runs are kept, so the same
command resumes an interrupted grid. Every comparison is paired: same prompts, same noise.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeprune import shapes
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import HALF, INT4
from edgeprune.artefact.resolve import read_config
from edgeprune.common.files import digest, files_digest, read_json, write_json
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.compare.grid import Grid, Row
from edgeprune.compare.summary import summarise
from edgeprune.metrics import Metric, evaluations, of_pipeline, tasks_of
from edgeprune.metrics.scoring import CAPTIONS
from edgeprune.quantization.precision import footprint
from edgeprune.report.steps import step_times
from edgeprune.residency.model_files import model_files
from edgeprune.residency.running import running
from edgeprune.sampling.generation import Generation, say_guesses
from edgeprune.sampling.prompts import prompts as shipped_prompts
from edgeprune.sampling.prompts import read_prompts
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.compress import forecast
from edgeprune.stages.distill import defaults_of, seen_by_quantize
from edgeprune.stages.distill import run as run_distill
from edgeprune.stages.options import CompressOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace


def prompts_to_score(
    builtin: bool, prompts: str | None, per_task: int, metric: str = "shapes", split: Split = Split.HELD_OUT
) -> list[str]:
    """Return the prompts to score on: the file's, the metric's own, or captions of shapes world or of edgeprune.

    Args:
        builtin: whether the model is the built-in one.
        prompts: a text file with one prompt per line.
        per_task: the number of prompts of each task, where prompts have tasks.
        metric: how models are scored.
        split: the split of the prompts that are no file's.

    Raises:
        InputError: the file cannot be used.
    """
    if prompts:
        return read_prompts(Path(prompts))
    if tasks := shapes if builtin else tasks_of(metric):
        return [p.text for p in tasks.evaluation_prompts(per_task, split=split)]
    return shipped_prompts(split, CAPTIONS)


def check_rows(grid: Grid, *, builtin: bool) -> None:
    """Check that the rows that are distilled have data to train on.

    Raises:
        InputError: they have none.
    """
    for row in grid.rows:
        row.options.check_data(builtin=builtin)


def forecast_grid(source: Path, grid: Grid, prompts: int, metric: str, variant: str | None = None) -> dict[str, Any]:
    """Return what a grid costs, from configs alone: runs, training steps, lower bounds of time, bytes written.

    `forecast` in stages/compress.py describes the fields.
    """
    check_pipeline(source, variant)
    config, family = read_config(source)
    generation = Generation.load(source)
    say_guesses(source, ())
    budget = int(grid.budget * footprint(family, family.tensor_shapes(config)).bf16_bytes)
    forecasts = [(row.seeds, forecast(source, row.seeded(0, budget), generation)) for row in grid.rows]
    first, runs = forecasts[0][1], sum(seeds for seeds, _ in forecasts)
    per_step = 2 if family.guided(config, generation.guidance_scale) else 1
    scored = (runs + 1) * evaluations(metric, generation, prompts, per_step)
    copied = sum(p.stat().st_size for p in model_files(source, variant) if p.parent.name != HALF)
    trained = [costs for _, costs in forecasts if costs["distill_steps"]]
    return {
        "rows": len(forecasts),
        "runs": runs,
        "training_steps": sum(seeds * costs["distill_steps"] for seeds, costs in forecasts),
        "analyze_floor_s": first["analyze_floor_s"] if grid.reads_contributions else 0.0,
        "data_floor_s": trained[0]["data_floor_s"] if trained else 0.0,
        "distill_floor_s": round(sum(seeds * costs["distill_floor_s"] for seeds, costs in forecasts), 1),
        "score_evaluations": scored,
        "score_floor_s": round(scored * first["evaluation_flops"] / first["matmul_flops_per_s"], 1),
        "peak_weights_bytes": max(costs["distill_weights_bytes"] for _, costs in forecasts),
        "written_bytes": sum(seeds * (costs["written_bytes"] + copied) for seeds, costs in forecasts),
    }


def compare(
    base: Workspace,
    grid: Grid,
    metric: str,
    prompts: list[str],
    out: Path,
    progress: Progress = silent,
    *,
    weights: Mapping[str, str] | None = None,
    split: Split = Split.HELD_OUT,
) -> dict[str, Any]:
    """Make and score every run that `out` lacks; return the summary of all.

    `out/results.json` keeps the scores of every run.

    Args:
        base: a folder of the original, which holds its analysis.
        prompts: to score on; nothing may be trained or calibrated on them.
        weights: weights of the metric, see metrics.KNOWN.
        split: whose seeds to draw with: held out, or tuning where the scores choose options.

    Raises:
        BudgetError: a method cannot meet the budget.
    """
    before = footprint(base.family, base.family.tensor_shapes(base.config)).bf16_bytes
    if grid.reads_contributions:
        run_analyze(base, grid.analyze, progress)
    scorer = of_pipeline(metric, base.pipe, base.generation, prompts, weights, split=split)
    path = out / "results.json"
    results: dict[str, Any] = read_json(path) if path.is_file() else {}
    identity: dict[str, Any] = {"metric": metric, "prompts": prompts, "seeds": split.seed(0)}
    identity["weights"] = base.weights_hash
    if weights:
        identity["metric_weights"] = {name: [given, files_digest(Path(given))] for name, given in weights.items()}

    def once(name: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        inputs = digest({**identity, **key})
        if results.get(name, {}).get("inputs") != inputs:
            began = time.monotonic()
            results[name] = {**make(), "inputs": inputs, "seconds": time.monotonic() - began}
            write_json(path, results)

    once("original", {"generation": base.generation.to_json()}, lambda: {"scores": scorer.score(), "bytes": before})
    runs = [(row, seed) for row in grid.rows for seed in range(row.seeds)]
    for index, (row, seed) in enumerate(runs):
        progress("compare", index, len(runs), f"{row.name}, seed {seed}")
        options = row.seeded(seed, int(grid.budget * before))
        key = {"options": options.to_json(), "quantized": row.quantized, "generation": base.generation.to_json()}
        if options.distill is not None:
            key["recipe"] = defaults_of(options.plan.method)
        make = functools.partial(_run, base, row, options, out / row.name / f"seed-{seed}", scorer, progress)
        once(f"{row.name}/seed-{seed}", key, make)
    progress("compare", len(runs), len(runs), "")
    metric_tasks = tasks_of(metric)
    tasks = [metric_tasks.parse(prompt).task for prompt in prompts] if metric_tasks else None
    return summarise(results, grid, tasks)


def _run(
    base: Workspace, row: Row, options: CompressOptions, folder: Path, scorer: Metric, progress: Progress
) -> dict[str, Any]:
    """Compress and score one run; return its scores, bytes, plan, seconds of training and step time."""
    ws = base.sibling(folder)
    ws.fresh = True  # replace the folder of another grid that has a row of the same name
    run_plan(ws, options.plan, base.report_path if row.reads_contributions else None)
    if options.distill is None:
        ws.skip_distillation()
    run_prune(ws, progress)
    if options.distill is not None:
        calibration = options.settled(ws.subject.numbers).quantize.calibration
        training = seen_by_quantize(ws, options.distill, calibration, ws.plan())
        run_distill(ws, training, options.data, progress)
    if row.quantized:
        run_quantize(ws, options.quantize, progress)
    teacher, plan = base.pipe.transformer, ws.plan()
    compute = base.original.compute
    times = step_times(base, teacher, running(open_transformer(ws.out, quantized=False), compute))
    base.pipe.transformer = running(open_transformer(ws.out, quantized=row.quantized), compute)
    try:
        scores = scorer.score()
    finally:
        base.pipe.transformer = teacher
    weights = ws.out / (INT4 if row.quantized else HALF)
    return {
        "scores": scores,
        "bytes": sum(p.stat().st_size for p in weights.glob("*.safetensors")),
        "blocks": plan.blocks,
        "components": plan.components,
        "modulation_rank": plan.modulation_rank,
        "train_s": ws.manifest.stages["distill"]["seconds"] if options.distill else 0.0,
        "step_ratio": times.ratio,
        "step_ratio_quartiles": times.quartiles,
    }
