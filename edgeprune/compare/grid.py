"""A grid of methods at one budget, each trained with several seeds and scored against the original on the same prompts.

    compare(Workspace(out / "original", None), Grid.load(GRIDS / "demo.toml"), "shapes", prompts, out)

Every row is a folder `OUT/<row>/seed-<n>`, made by the stages of pipeline.py; what a killed run has finished is kept,
so the same command goes on. Intervals are of a bootstrap over prompts and training seeds (stats.py), and every
comparison is paired: same prompts, same noise. What it leaves out: table and plot (compare_page.py).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from edgeprune import shapes
from edgeprune.artefact import checkpoint
from edgeprune.artefact.checkpoint import HALF, INT4
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import digest, files_digest, read_json, write_json
from edgeprune.common.intervals import mean_interval, paired_drop
from edgeprune.metrics import Metric, evaluations, of_pipeline, tasks_of
from edgeprune.planning.baselines import baselines
from edgeprune.planning.plan import METHODS, PlanOptions
from edgeprune.quantization.precision import footprint
from edgeprune.report.figures import step_times
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import read_prompts
from edgeprune.stages import pipeline
from edgeprune.stages.forecast import forecast
from edgeprune.stages.pipeline import CompressOptions, Progress, Workspace, as_published, silent
from edgeprune.training.recipe import DistillOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRIDS = Path(__file__).parent / "grids"
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Row:
    """One way to compress."""

    name: str
    options: CompressOptions
    quantized: bool
    seeds: int
    group: str
    """Rows of one group are drawn alike."""


@dataclass(frozen=True)
class Grid:
    """Rows at one budget."""

    budget: float
    """Share of the original's bf16 bytes that the weights may take after INT4; no part of `manual` plans."""
    reference: str
    """The row that every other one is compared with."""
    rows: tuple[Row, ...]

    @classmethod
    def load(cls, path: Path, start: CompressOptions) -> Grid:
        """Read a grid; what its tables may hold are the fields of the options.

        Args:
            start: what fields have that nobody sets.

        Raises:
            InputError: a name or a value that does not fit; says where.
        """
        try:
            data = _Grid.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
            rows = tuple(_row(row, data, start) for row in data.rows)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or error.title
            raise InputError(f"{path}: {where}: found {shown(first['input'])}: {first['msg']}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a readable TOML file ({error})") from error
        names = [row.name for row in rows]
        if len(set(names)) < len(names) or data.reference not in names:
            raise InputError(
                f"{path}: reference: found {data.reference!r} among {', '.join(names)}, expected one of them, once"
            )
        return cls(data.budget, data.reference, rows)


class _Row(BaseModel, extra="forbid"):
    """As a grid's file has it; `distill = false` and `quantize = false` leave a stage out."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    group: str = ""
    seeds: int | None = Field(default=None, ge=1, le=_MOST_SEEDS)
    plan: dict[str, Any] = {}
    distill: dict[str, Any] | Literal[False] = {}
    quantize: dict[str, Any] | Literal[False] = {}
    aware: bool = True
    """Whether it is trained with weights rounded to INT4, where it becomes INT4."""


class _Grid(BaseModel, extra="forbid"):
    """As the file has it; `distill` and `quantize` are for all rows, whose own come on top."""

    budget: float = Field(gt=0, lt=1)
    reference: str
    seeds: int = Field(default=1, ge=1, le=_MOST_SEEDS)
    distill: dict[str, Any] = {}
    quantize: dict[str, Any] = {}
    rows: list[_Row] = Field(min_length=1)


T = TypeVar("T")


def _set(base: T, *given: Mapping[str, Any]) -> T:
    """Options with these fields, the last one's winning, checked by their types."""
    said = {name: value for fields in given for name, value in fields.items()}
    known = {f.name: getattr(base, f.name) for f in fields(base)}  # type: ignore[arg-type]
    if unknown := sorted(said.keys() - known):
        raise InputError(f"found {unknown[0]!r}, expected one of {', '.join(known)}")
    return TypeAdapter(type(base)).validate_python(known | said)


def _row(row: _Row, grid: _Grid, start: CompressOptions) -> Row:
    if "prompts" in row.plan:
        raise InputError(f"{row.name}: plan.prompts: found a file's name, expected none: it may be of another folder")
    plan, training, quantize = _set(PlanOptions(), row.plan), None, start.quantize
    if plan.method not in METHODS:
        raise InputError(f"{row.name}: plan.method: found {plan.method!r}, expected one of {', '.join(METHODS)}")
    if row.quantize is not False:
        quantize = _set(start.quantize, grid.quantize, row.quantize)
    if row.distill is not False:
        rounded = quantize.group_size if row.quantize is not False and row.aware else None
        training = _set(replace(start.distill or DistillOptions(), int4_group_size=rounded), grid.distill, row.distill)
        training.check()
    plan = replace(plan, group_size=quantize.group_size)
    options = as_published(replace(start, plan=plan, distill=training, quantize=quantize))
    drawn = plan.method in baselines() and baselines()[plan.method].drawn
    seeds = 1 if training is None and not drawn else row.seeds or grid.seeds
    return Row(row.name, options, row.quantize is not False, seeds, row.group)


def grid_named(name: str) -> Path:
    """The file of a grid that comes with the package.

    Raises:
        InputError: there is none of that name.
    """
    path = GRIDS / f"{name}.toml"
    names = sorted(p.stem for p in GRIDS.glob("*.toml"))
    if name not in names:
        raise InputError(f"--preset: found {name!r}, expected one of {', '.join(names)}")
    return path


def held_out_prompts(builtin: bool, prompts: str | None, per_task: int) -> list[str]:
    """What is scored on: the file's, or for the built-in model shapes world's held-out captions.

    Raises:
        InputError: neither; the list that comes with the package is what models are analysed and trained on.
    """
    if prompts:
        return read_prompts(Path(prompts))
    if not builtin:
        raise InputError("compare: give --prompts, a text file of prompts that nothing is trained on, to score on")
    return [p.text for p in shapes.evaluation_prompts(per_task)]


def forecast_grid(source: Path, grid: Grid, prompts: int, metric: str) -> dict[str, Any]:
    """What a grid costs, from configs alone: runs, training steps, floors of time, bytes written; see forecast.py."""
    config, family = checkpoint.read_config(source)
    generation = Generation.load(source)
    budget = int(grid.budget * footprint(family, family.tensor_shapes(config)).bf16_bytes)
    each = [(row.seeds, forecast(source, seeded(row, 0, budget), generation)) for row in grid.rows]
    first, runs = each[0][1], sum(seeds for seeds, _ in each)
    per_step = 2 if family.guided(config, generation.guidance_scale) else 1
    scored = (runs + 1) * evaluations(metric, generation, prompts, per_step)
    copied = sum(p.stat().st_size for p in source.rglob("*") if p.is_file() and p.parent.name != HALF)
    trained = [found for _, found in each if found["distill_steps"]]
    analyzed = any(row.options.plan.scored or _guided(row.options) for row in grid.rows)
    return {
        "rows": len(each),
        "runs": runs,
        "training_steps": sum(seeds * found["distill_steps"] for seeds, found in each),
        "analyze_floor_s": first["analyze_floor_s"] if analyzed else 0.0,
        "data_floor_s": trained[0]["data_floor_s"] if trained else 0.0,
        "distill_floor_s": round(sum(seeds * found["distill_floor_s"] for seeds, found in each), 1),
        "score_evaluations": scored,
        "score_floor_s": round(scored * first["evaluation_flops"] / first["matmul_flops_per_s"], 1),
        "peak_weights_bytes": max(found["distill_weights_bytes"] for _, found in each),
        "written_bytes": sum(seeds * (found["written_bytes"] + copied) for seeds, found in each),
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
) -> dict[str, Any]:
    """Make and score every row that is not there yet; returns what `summarise` makes of it, and writes it to `out`.

    Args:
        base: a folder of the original's own, where it is analysed.
        prompts: what is scored on; none that anything was trained or calibrated on.
        weights: the metric's own, see metrics.KNOWN.

    Raises:
        BudgetError: a method cannot meet the budget.
    """
    before = footprint(base.family, base.family.tensor_shapes(base.config)).bf16_bytes
    if any(row.options.plan.scored or _guided(row.options) for row in grid.rows):
        pipeline.run_analyze(base, base_options(grid), progress)
    scorer = of_pipeline(metric, base.pipe, base.generation, prompts, weights)
    path = out / "results.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    identity: dict[str, Any] = {"metric": metric, "prompts": prompts, "weights": base.weights_hash}
    if weights:
        identity["metric_weights"] = {name: [given, files_digest(Path(given))] for name, given in weights.items()}

    def once(name: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        whole = digest({**identity, **key})
        if found.get(name, {}).get("inputs") != whole:
            began = time.monotonic()
            found[name] = {**make(), "inputs": whole, "seconds": time.monotonic() - began}
            write_json(path, found)

    once("original", {"generation": asdict(base.generation)}, lambda: {"scores": scorer.score(), "bytes": before})
    runs = [(row, seed) for row in grid.rows for seed in range(row.seeds)]
    for index, (row, seed) in enumerate(runs):
        progress("compare", index, len(runs), f"{row.name}, seed {seed}")
        options = seeded(row, seed, int(grid.budget * before))
        key = {"options": asdict(options), "quantized": row.quantized, "generation": asdict(base.generation)}
        make = functools.partial(_run, base, row, options, out / row.name / f"seed-{seed}", scorer, progress)
        once(f"{row.name}/seed-{seed}", key, make)
    progress("compare", len(runs), len(runs), "")
    own = tasks_of(metric)
    return summarise(found, grid, [own.parse(prompt).task for prompt in prompts] if own else None)


def _guided(options: CompressOptions) -> bool:
    return options.distill is not None and options.distill.sensitivity != "off"


def base_options(grid: Grid) -> pipeline.AnalyzeOptions:
    """What the original is analysed with: as the first row says, which all have from one preset."""
    return grid.rows[0].options.analyze


def seeded(row: Row, seed: int, budget_bytes: int) -> CompressOptions:
    """A row's options for one training seed."""
    plan = replace(row.options.plan, seed=seed)
    if plan.method != "manual":
        plan = replace(plan, keep=None, max_memory_bytes=budget_bytes)
    training = row.options.distill and replace(row.options.distill, seed=seed)
    return replace(row.options, plan=plan, distill=training)


def _run(
    base: Workspace, row: Row, options: CompressOptions, folder: Path, scorer: Metric, progress: Progress
) -> dict[str, Any]:
    """Compress once and score; seconds of training, bytes, one step's time against the original's."""
    ws = base.beside(folder)
    ws.fresh = True  # another grid of the same name replaces what this one finds
    needed = options.plan.scored or _guided(options)
    pipeline.run_plan(ws, options.plan, base.report_path if needed else None)
    if options.distill is None:
        ws.skip_distillation()
    pipeline.run_prune(ws, progress)
    if options.distill is not None:
        pipeline.run_distill(ws, options.distill, options.data, progress)
    if row.quantized:
        pipeline.run_quantize(ws, options.quantize, progress)
    teacher, plan = base.pipe.transformer, ws.plan()
    times = step_times(base, [teacher, checkpoint.load_transformer(ws.out, quantized=False)])
    base.pipe.transformer = checkpoint.load_transformer(ws.out, quantized=row.quantized)
    try:
        scores = scorer.score()
    finally:
        base.pipe.transformer = teacher
    part = ws.out / (INT4 if row.quantized else HALF)
    return {
        "scores": scores,
        "bytes": sum(p.stat().st_size for p in part.glob("*.safetensors")),
        "blocks": plan.blocks,
        "components": plan.components,
        "modulation_rank": plan.modulation_rank,
        "train_s": ws.manifest.stages["distill"]["seconds"] if options.distill else 0.0,
        "step_ratio": times[1] / times[0],
    }


# ------------------------------------------------------------------------------------------- statistics


def summarise(found: Mapping[str, Any], grid: Grid, tasks: list[str] | None) -> dict[str, Any]:
    """Per row: bytes, score, relative drop, lead of the reference, each with its interval where it is a sample.

    Args:
        tasks: of each prompt, where the metric has tasks.
    """
    original = np.asarray(found["original"]["scores"])
    runs = {row.name: [found[f"{row.name}/seed-{seed}"] for seed in range(row.seeds)] for row in grid.rows}
    scores = {name: np.asarray([run["scores"] for run in mine]) for name, mine in runs.items()}
    rows = []
    for row in grid.rows:
        mine = runs[row.name]
        alike = all(run["blocks"] == mine[0]["blocks"] for run in mine)  # else by lot
        lead = paired_drop(scores[grid.reference], scores[row.name], tasks).difference
        rows.append(
            {
                "name": row.name,
                "group": row.group,
                "seeds": row.seeds,
                "blocks": mine[0]["blocks"] if alike else None,
                "components": len(mine[0]["components"]),
                "modulation_rank": mine[0]["modulation_rank"],
                "bytes": max(run["bytes"] for run in mine),
                "bytes_ratio": max(run["bytes"] for run in mine) / found["original"]["bytes"],
                "step_ratio": float(np.median([run["step_ratio"] for run in mine])),
                "train_s": sum(run["train_s"] for run in mine),
                "score": mean_interval(scores[row.name], tasks),
                "relative_drop": paired_drop(original, scores[row.name], tasks).relative,
                "lead": None if row.name == grid.reference else lead,
            }
        )
    return {
        "budget": grid.budget,
        "reference": grid.reference,
        "prompts": len(original),
        "seconds": sum(run.get("seconds", 0.0) for run in found.values()),
        "original": {"score": mean_interval(original, tasks), "bytes": found["original"]["bytes"]},
        "rows": rows,
    }
