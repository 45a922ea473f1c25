"""Runs a grid: compresses by every row with several seeds, and scores against the original on the same prompts.

    base = Workspace(out / "original", None)
    grid = Grid.load(grid_named("demo"), preset("default", world=base.world))
    compare(base, grid, "shapes", prompts, out)

Every run is a folder `OUT/<row>/seed-<n>`, made by the stages of `compress`. Finished runs are kept, so the same
command resumes an interrupted grid. Every comparison is paired: same prompts, same noise.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import HALF, INT4
from edgeprune.artefact.resolve import read_config
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, files_digest, read_json, write_json
from edgeprune.common.linking import is_linked
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.compare import reference as other
from edgeprune.compare.grid import Grid, Row
from edgeprune.compare.summary import summarise
from edgeprune.metrics import Metric, evaluations, of_pipeline, preparing, tasks_of
from edgeprune.metrics.scoring import CAPTIONS
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.precision import footprint
from edgeprune.report.steps import step_times
from edgeprune.residency.compute import Compute
from edgeprune.residency.model_files import model_files
from edgeprune.residency.running import running
from edgeprune.residency.streaming import release
from edgeprune.sampling.generation import Generation, say_guesses
from edgeprune.sampling.prompts import prompts as shipped_prompts
from edgeprune.sampling.prompts import read_prompts
from edgeprune.shapes import World
from edgeprune.stages import analyze
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.compress import expected_plan, forecast, memories, works
from edgeprune.stages.distill import defaults_of, recipe_of, seen_by_quantize
from edgeprune.stages.distill import run as run_distill
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import AnalyzeOptions, CompressOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.work import Subject, Work
from edgeprune.stages.workspace import Workspace
from edgeprune.training.work import steps_in


def prompts_to_score(
    world: World | None, prompts: str | None, per_task: int, metric: str = "shapes", split: Split = Split.HELD_OUT
) -> list[str]:
    """Return the prompts to score on: the file's, the metric's own, or captions of shapes world or of edgeprune.

    Args:
        world: that the model draws; None for other models.
        prompts: a text file with one prompt per line.
        per_task: the number of prompts of each task, where prompts have tasks.
        metric: how models are scored.
        split: the split of the prompts that are no file's.

    Raises:
        InputError: the file cannot be used.
    """
    if prompts:
        return read_prompts(Path(prompts))
    if tasks := world.grammar if world else tasks_of(metric, world):
        return [p.text for p in tasks.evaluation_prompts(per_task, split=split)]
    return shipped_prompts(split, CAPTIONS)


def check_rows(grid: Grid, *, world: World | None) -> None:
    """Check that the rows that are distilled have data to train on.

    Raises:
        InputError: they have none.
    """
    for row in grid.rows:
        row.options.check_data(world=world)


def forecast_grid(
    source: Path,
    grid: Grid,
    prompts: int,
    metric: str,
    out: Path,
    variant: str | None = None,
    compute: ComputeOptions | None = None,
) -> dict[str, Any]:
    """Return what a grid costs, from configs alone: runs, training steps, lower bounds of time, bytes written.

    `forecast` in stages/compress.py describes the fields.

    Args:
        source: the pipeline's folder.
        grid: what to run.
        prompts: how many are scored on.
        metric: how models are scored.
        out: the folder of the runs, which need not exist.
        variant: of the weights.
        compute: where networks run; None for a GPU that torch finds, else the processor.
    """
    check_pipeline(source, variant)
    config, family = read_config(source)
    generation = Generation.load(source)
    say_guesses(source, ())
    budget = int(grid.budget * footprint(family, family.tensor_shapes(config)).bf16_bytes)
    subject, forecasts = Subject(source, family, config, generation), list[tuple[int, dict[str, Any]]]()
    for row in grid.rows:
        options = row.seeded(0, budget)
        if row.work is not None:
            options = at_work(row, options, expected_plan(source, generation, options), subject)
        forecasts.append((row.seeds, forecast(source, options, generation, compute=compute)))
    first, runs = forecasts[0][1], sum(seeds for seeds, _ in forecasts)
    scored = (runs + 1) * evaluations(metric, generation, prompts, subject.by_step)
    scoring = _scoring_bytes(Memory(subject, Compute.of(compute or ComputeOptions())), metric, prompts)
    copied = _copied_bytes(source, out, variant)
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
        "memory_bytes": max(scoring, *(n for _, costs in forecasts for key, n in costs.items() if "_memory_" in key)),
        "written_bytes": sum(seeds * (costs["written_bytes"] + copied) for seeds, costs in forecasts),
    }


def _scoring_bytes(of: Memory, metric: str, prompts: int) -> int:
    """Return the bytes that scoring takes at least."""
    return analyze.memory(of, AnalyzeOptions(metric=metric, estimator="exhaustive"), prompts)


def _copied_bytes(source: Path, out: Path, variant: str | None) -> int:
    """Return the bytes of an original that each of its artefacts has a copy of; what is linked takes no space."""
    files = [path for path in model_files(source, variant) if path.parent.name != HALF]
    return sum(path.stat().st_size for path in files if not is_linked(path, out))


@dataclass(frozen=True)
class _Run:
    """A row with one seed."""

    row: Row
    seed: int
    options: CompressOptions

    @property
    def name(self) -> str:
        """Its name in results.json, and its folder."""
        return f"{self.row.name}/seed-{self.seed}"

    def key(self, generation: Generation) -> dict[str, Any]:
        """Return what its result depends on, besides the model and the scores."""
        key = {"options": self.options.to_json(), "quantized": self.row.quantized, "generation": generation.to_json()}
        if self.options.distill is not None:
            key["recipe"] = defaults_of(self.options.plan.method)
        if self.row.work is not None:
            key["work"] = self.row.work
        return key


def at_work(row: Row, options: CompressOptions, plan: PrunePlan, subject: Subject) -> CompressOptions:
    """Return a row's options with as many training steps as its work allows; unchanged if it has none.

    Raises:
        InputError: the work does not suffice for a step, or the number of states is not set.
    """
    if row.work is None or options.distill is None:
        return options
    recipe = recipe_of(options.distill, plan, subject.family, subject.config, subject.generation)
    if recipe.states and options.distill.states is None:  # their number would follow from the steps
        raise InputError(
            f"{row.name}: distill.states: a large model is trained from states by default; with work, say how many, "
            "or 0 for none"
        )
    try:
        steps = steps_in(row.work, plan, recipe, options.distill)
    except InputError as error:
        raise InputError(f"{row.name}: {error}") from None
    return replace(options, distill=replace(options.distill, steps=steps))


def _check(base: Workspace, runs: Sequence[_Run], metric: str, prompts: int, out: Path, progress: Progress) -> None:
    """Say what some runs take at least, and refuse what takes too long or too much memory.

    The original's analysis and the training data, which they share, count once, unless they are there.

    Raises:
        InputError: they take longer than `ComputeOptions.longest_s`, or more memory than was given.
    """
    subject, shared, total, written = base.subject, dict[str, Work](), Work(), 0
    memory = _scoring_bytes(base.memory, metric, prompts)
    per_score = evaluations(metric, base.generation, prompts, subject.by_step)
    copied = _copied_bytes(base.source, out, base.variant)
    plans = dict[str, PrunePlan]()
    for run in runs:
        if run.row.name not in plans:  # another seed leaves as much
            plans[run.row.name] = expected_plan(base.source, base.generation, run.options)
        expected = plans[run.row.name]
        options = at_work(run.row, run.options, expected, subject)
        stages = works(subject, options, expected, 0)
        shared |= {name: work for name in ("analyze", "data") if (work := stages.pop(name)).evaluations}
        del stages["encoders"]
        if not run.row.quantized:
            del stages["quantize"]
        left = expected.after.parameters / expected.before.parameters
        total += sum(stages.values(), Work(evaluations=per_score * left))
        written += expected.after.bf16_bytes + run.row.quantized * expected.after.int4_bytes + copied
        memory = max(memory, *memories(base.memory, options, expected, 0).values())
    if "analyze" in base.manifest.stages:
        shared.pop("analyze", None)
    if any(base.cache.glob("data-*")):
        shared.pop("data", None)
    scored = preparing(metric, base.generation, prompts, subject.by_step) + per_score
    total += sum(shared.values(), Work(evaluations=scored))
    base.check_time("compare", total, [], progress, memory=memory, written=written)


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
    reference: Path | None = None,
) -> dict[str, Any]:
    """Make and score every run that `out` lacks; return the summary of all.

    `out/results.json` keeps the scores of every run.

    Args:
        base: a folder of the original, which holds its analysis.
        prompts: to score on; nothing may be trained or calibrated on them.
        weights: weights of the metric, see metrics.KNOWN.
        split: whose seeds to draw with: held out, or tuning where the scores choose options.
        reference: another architecture to score on the same prompts and seeds, see reference.py.

    Raises:
        BudgetError: a method cannot meet the budget.
        InputError: what is left takes longer than the workspace's `longest_s`, or more memory than it was given.
    """
    before = footprint(base.family, base.family.tensor_shapes(base.config)).bf16_bytes
    path = out / "results.json"
    results: dict[str, Any] = read_json(path) if path.is_file() else {}
    identity: dict[str, Any] = {"metric": metric, "prompts": prompts, "seeds": split.seed(0)}
    identity["weights"] = base.weights_hash
    if weights:
        identity["metric_weights"] = {name: [given, files_digest(Path(given))] for name, given in weights.items()}

    def lacks(name: str, key: dict[str, Any]) -> bool:
        return bool(results.get(name, {}).get("inputs") != digest({**identity, **key}))

    def once(name: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        if lacks(name, key):
            began = time.monotonic()
            made, inputs = make(), digest({**identity, **key})
            results[name] = {**made, "inputs": inputs, "seconds": time.monotonic() - began}
            write_json(path, results)

    runs = [
        _Run(row, seed, row.seeded(seed, int(grid.budget * before))) for row in grid.rows for seed in range(row.seeds)
    ]
    if left := [run for run in runs if lacks(run.name, run.key(base.generation))]:
        _check(base, left, metric, len(prompts), out, progress)
    if grid.reads_contributions:
        run_analyze(base, grid.analyze, progress)
    scorer = of_pipeline(
        metric, base.pipe, base.generation, prompts, weights, split=split, world=base.world,
        device=str(base.original.compute.device),
    )  # fmt: skip
    once("original", {"generation": base.generation.to_json()}, lambda: {"scores": scorer.score(), "bytes": before})
    for index, run in enumerate(runs):
        progress("compare", index, len(runs), f"{run.row.name}, seed {run.seed}")
        make = functools.partial(_run, base, run.row, run.options, out / run.name, scorer, progress)
        once(run.name, run.key(base.generation), make)
    progress("compare", len(runs), len(runs), "")
    metric_tasks = tasks_of(metric, base.world)
    tasks = [metric_tasks.parse(prompt).task for prompt in prompts] if metric_tasks else None
    summary = summarise(results, grid, tasks)
    if reference is not None:
        size = {"height": base.generation.height, "width": base.generation.width}
        release(base.pipe.transformer)
        make = functools.partial(other.score, reference, metric, prompts, weights, split, base.original.compute, size)
        once(other.NAME, {"folder": other.identity(reference), "size": size}, make)
        summary[other.NAME] = other.summarise(results[other.NAME], results["original"], tasks)
    return summary


def _run(
    base: Workspace, row: Row, options: CompressOptions, folder: Path, scorer: Metric, progress: Progress
) -> dict[str, Any]:
    """Compress and score one run; return its scores, bytes, plan, seconds of training and step time."""
    ws = base.sibling(folder)
    ws.fresh = True  # replace the folder of another grid that has a row of the same name
    run_plan(ws, options.plan, base.report_path if row.reads_contributions else None)
    options = at_work(row, options, ws.plan(), ws.subject)
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
    release(teacher)  # of large models one at a time has room
    # Neither model keeps blocks now, so that both are timed alike.
    times = step_times(base, teacher, running(open_transformer(ws.out, quantized=False), compute, keep=False))
    base.pipe.transformer = running(open_transformer(ws.out, quantized=row.quantized), compute)
    try:
        scores = scorer.score()
    finally:
        release(base.pipe.transformer)
        base.pipe.transformer = teacher
    weights = ws.out / (INT4 if row.quantized else HALF)
    return {
        "scores": scores,
        "bytes": sum(p.stat().st_size for p in weights.glob("*.safetensors")),
        "blocks": plan.blocks,
        "components": plan.components,
        "modulation_rank": plan.modulation_rank,
        "steps": options.distill.steps if options.distill else 0,
        "train_s": ws.manifest.stages["distill"]["seconds"] if options.distill else 0.0,
        "step_ratio": times.ratio,
        "step_ratio_quartiles": times.quartiles,
    }
