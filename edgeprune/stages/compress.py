"""All stages in their order: analyze, plan, prune, distill, quantize, encoders; their presets, and what they cost.

The forecast of `compress` needs configs only, no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.analysis.contribution import ContributionReport, fingerprint, groups
from edgeprune.artefact.resolve import read_original
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.files import need_space
from edgeprune.common.linking import is_linked
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.data.cache import is_cache
from edgeprune.data.settings import SHAPES
from edgeprune.families.encoders import text_encoders
from edgeprune.metrics import check_analysis
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import Scored, methods
from edgeprune.planning.modulation import ranks
from edgeprune.planning.options import DEFAULT
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width
from edgeprune.residency.compute import Compute
from edgeprune.residency.model_files import model_files
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import World
from edgeprune.stages import analyze, distill, encoders, plan, prune, quantize, tail
from edgeprune.stages.costs import flops_per_evaluation
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import COUNTED_BY_COMPRESS, AnalyzeOptions, CompressOptions, DataOptions, seen
from edgeprune.stages.prompts import CALIBRATION_PROMPTS, analysis_prompts
from edgeprune.stages.work import (
    Subject,
    Work,
    check_memory,
    encoding,
    least,
    report_images,
    reporting,
    shapes_per_task,
)
from edgeprune.stages.workspace import ENCODERS_STAGE, Workspace
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import DistillOptions


def preset(name: str, *, world: World | None, data: str | None = None) -> CompressOptions:
    """Return the options of a preset: `default`, or `quick` for a first look and for CI.

    Without data, a model that draws no shapes world is not distilled: nothing that comes with edgeprune stands for the
    images that it should draw. The paper trained 64,000 steps of 64 on YE-POP; the default is 1,000 steps of 32.

    A teacher of shapes world is small and takes a larger learning rate. It loses components rather than blocks, which
    was measured on the built-in one: that hardly uses its context MLPs, and at the same bytes much more of the velocity
    is kept (README.md has the figures).

    Args:
        name: of the preset.
        world: that the model draws; None for other models.
        data: what to train on, see DataOptions.

    Raises:
        InputError: unknown name.
    """
    if name not in ("default", "quick"):
        raise InputError(f"--preset: found {name!r}, expected default or quick")
    options = CompressOptions(plan=DEFAULT, data=DataOptions(data), distill=DistillOptions() if data else None)
    if world:
        training = DistillOptions(steps=400, batch=32, rate=5e-4, schedule="cosine", ema=0.98)
        plan_options = replace(options.plan, method="hybrid", threshold=0.0, protect_first=0)
        options = replace(options, plan=plan_options, data=DataOptions(data or SHAPES, 6000), distill=training)
    if name == "quick":
        options = replace(
            options,
            analyze=AnalyzeOptions(count=7, estimator="gates"),
            data=replace(options.data, samples=512),
            distill=options.distill and replace(options.distill, steps=40, batch=16),
        )
    return options


def rehearse(source: Path, generation: Generation, options: CompressOptions) -> PrunePlan:
    """Return a plan as if all parts contributed alike; it leaves about as many bytes as the real plan will.

    A modulation rank that has to be measured counts as the smallest one, so no budget is refused that can be met.
    `expected_plan` is the forecast.

    Args:
        source: the pipeline's folder.
        generation: how images are made.
        options: of all stages.

    Raises:
        BudgetError: no plan with these options meets the budget.
        InputError: the metric is unknown, or its weights are missing; or guidance is to be learned that there is not.
    """
    check_analysis(options.analyze.metric, options.analyze.weights)
    config, family = read_original(source)
    if options.distill is not None:
        distill.check_guidance(Subject(source, family, config, generation), options.distill)
    rank = options.plan.modulation_rank
    if isinstance(rank, str):
        rank = ranks(modulation_width(family, config))[0]
    return _plan_alike(source, generation, options, rank)


def expected_plan(source: Path, generation: Generation, options: CompressOptions) -> PrunePlan:
    """Return the plan that a forecast counts: all parts contribute alike, as in `rehearse`.

    A modulation rank that has to be measured counts as the largest one that meets the budget, so no size, time or
    memory is understated.

    Raises:
        BudgetError: no plan with these options meets the budget.
        InputError: see `rehearse`.
    """
    smallest = rehearse(source, generation, options)
    if not isinstance(options.plan.modulation_rank, str) or smallest.modulation_rank is None:
        return smallest

    config, family = read_original(source)
    for rank in reversed(ranks(modulation_width(family, config))):
        try:
            return _plan_alike(source, generation, options, rank)
        except BudgetError:
            continue
    return smallest


def _plan_alike(source: Path, generation: Generation, options: CompressOptions, rank: int | None) -> PrunePlan:
    """Return a plan at this modulation rank in which all parts contribute alike.

    Raises:
        BudgetError: no plan with these options meets the budget.
    """
    config, family = read_original(source)
    alike = dict.fromkeys(groups(family, config, components=options.analyze.components), 0.0)
    report = ContributionReport(
        fingerprint=fingerprint(config),
        family=family.name,
        num_blocks=family.block_count(config),
        metric="none",
        prompts=[],
        untouched=[],
        scores={},
        summary=alike,
    )
    choices = replace(options.plan, modulation_rank=rank)
    method = methods().get(choices.method)
    if isinstance(method, Scored) and method.joint:  # hybrid may remove the same parts
        choices = replace(choices, method="hybrid", threshold=1.0)
    even = [1.0] * report.num_blocks
    budget = plan.budget_for(source, generation, choices, options.text_form)
    return make_plan(family, config, report, choices, budget, even)


def forecast(
    source: Path,
    options: CompressOptions,
    generation: Generation,
    *,
    compute: ComputeOptions | None = None,
    scratch: Path | None = None,
    quick: bool = False,
    images: int | None = None,
    steps: int | None = None,
    no_half: bool = False,
) -> dict[str, Any]:
    """Forecast what `compress` would cost: work, least time on this machine, memory of weights, and bytes written.

    Analysis holds a small transformer, and of a large one as many blocks as there is room for; the least is counted.
    See work.py for the work and the time.

    Args:
        source: the pipeline's folder.
        options: of all stages.
        generation: how images are made.
        compute: where networks run; None for a GPU that torch finds, else the processor.
        scratch: a folder on the disk that would be written to; None for the one of temporary files.
        quick: the report draws few images.
        images: that the report draws of each model; None for as many as `quick` says.
        steps: of these images; None for the model's own.
        no_half: see `compress`.

    Returns:
        Numbers with units in their names.

    Raises:
        BudgetError: the budget cannot be met, whatever the scores.
        InputError: an option or a config is not usable.
    """
    config, family = read_original(source)
    subject, expected = Subject(source, family, config, generation), expected_plan(source, generation, options)
    before, after = expected.before, expected.after
    place = Compute.of(compute or ComputeOptions())
    speeds = least(subject, place, scratch or Path(tempfile.gettempdir()))
    images = images_of_report(subject.world, quick) if images is None else images
    stages = works(subject, options, expected, images, steps)
    scored, training = stages["analyze"], options.distill
    if training:
        training.check()
    flops = flops_per_evaluation(family, config, source, generation)
    analysis = options.analyze.chosen(family, config)
    needed = memories(Memory(subject, place), options, expected, images)
    floors = {f"{stage}_floor_s": round(speeds.seconds(work), 1) for stage, work in stages.items()}
    return {
        "blocks": family.block_count(config),
        "parameters": before.parameters,
        "parameters_left": after.parameters,
        "int4_bytes": after.int4_bytes,
        "analyze_parts": 1 + len(analyze.analysis_groups(family, config, analysis)) if scored.evaluations else 0,
        "analyze_prompts": len(analysis_prompts(analysis, world=subject.world)) if scored.evaluations else 0,
        "analyze_evaluations": round(scored.evaluations),
        "distill_steps": training.steps if training else 0,
        "data_evaluations": round(stages["data"].evaluations),
        "report_evaluations": round(stages["report"].evaluations),
        **floors,
        "evaluation_flops": flops,
        "matmul_flops_per_s": round(flops / speeds.evaluation_s),
        **{f"{stage}_memory_bytes": size for stage, size in needed.items()},
        "written_bytes": (0 if no_half else after.bf16_bytes)
        + after.int4_bytes
        + encoders.written_bytes(source, options.text_form, options.quantize.group_size),
    }


def images_of_report(world: World | None, quick: bool) -> int:
    """Return how many images of each model the report draws, of a model that draws a world, or none."""
    return len(world.grammar.names) * shapes_per_task(quick) if world else report_images(quick)


def works(
    subject: Subject, options: CompressOptions, expected: PrunePlan, images: int, steps: int | None = None
) -> dict[str, Work]:
    """Return the work of each stage by its name, of drawing training `data`, and of the `report`.

    Args:
        subject: the original.
        options: of all stages.
        expected: what will be removed.
        images: of each model, which the report draws.
        steps: of these images; None for the model's own.
    """
    family, config = subject.family, subject.config
    analysis, training, scored = options.analyze.chosen(family, config), options.distill, Work()
    if options.reads_scores:
        prompts = len(analysis_prompts(analysis, world=subject.world))
        scored = analyze.work(subject, analysis, analyze.analysis_groups(family, config, analysis), prompts)
    int4, calibrating = options.settled(subject.numbers).quantize, calibrating_prompts(options, subject)
    drawn = replace(subject, generation=seen(subject.generation, steps))
    left = expected.after.parameters / expected.before.parameters
    own = replace(drawn, generation=drawn.generation.without_guidance()) if training and training.guidance else drawn
    pruned = expected if options.plan.stand_in is not None else replace(expected, stand_in_rank=None)
    return {
        "analyze": scored,
        "plan": encoding(subject, CALIBRATION_PROMPTS if expected.modulation_rank else 0, pooled=True),
        "prune": prune.work(subject, pruned),
        "data": distill.drawn(subject, options.data) if training else Work(),
        "distill": distill.trained(subject, training, expected) if training else Work(),
        "quantize": quantize.work(subject, int4, expected, calibrating),
        "encoders": encoders.work(subject, options.text_form, options.quantize.group_size),
        "report": reporting(drawn, images, left, own.per_image) if images else Work(),
    }


def memories(of: Memory, options: CompressOptions, expected: PrunePlan, images: int) -> dict[str, int]:
    """Return the bytes of memory that each stage takes at least by its name, and the report; 0 if it does not run.

    Args:
        of: the original.
        options: of all stages.
        expected: what will be removed.
        images: of each model, which the report draws.
    """
    subject, training = of.subject, options.distill
    analysis, scored = options.analyze.chosen(subject.family, subject.config), 0
    if options.reads_scores:
        scored = analyze.memory(of, analysis, len(analysis_prompts(analysis, world=subject.world)))
    return {
        "analyze": scored,
        "plan": of.encoding(CALIBRATION_PROMPTS, pooled=True) if expected.modulation_rank else 0,
        "prune": prune.memory(of, expected),
        "distill": distill.memory(of, training, options.data, expected, options.placement) if training else 0,
        "quantize": quantize.memory(of, calibrating_prompts(options, subject)),
        "encoders": encoders.memory(of, options.text_form),
        "report": of.reporting(images) if images else 0,
    }


def need_memory(of: Memory, options: CompressOptions, expected: PrunePlan, done: Container[str] = ()) -> None:
    """Refuse too little memory for one of the stages that are not done.

    A report that lacks it is left out, see report/make.py.

    Raises:
        InputError: more memory is needed than was given; says how much.
    """
    if of.compute.memory is not None:
        for stage, needed in memories(of, options, expected, 0).items():
            if stage not in done:
                check_memory(stage, needed, of.compute)


def check_training(options: CompressOptions, compute: Compute) -> None:
    """Refuse a training that cannot run on a device, before anything is computed.

    Raises:
        InputError: see `Parallel.check`.
    """
    if (training := options.distill) is not None:
        given = training.mixed_precision or "no"
        Parallel.check(given, training.batch, options.placement, compute.device, training.optimizer)


def calibrating_prompts(options: CompressOptions, subject: Subject) -> int:
    """Return how many prompts calibrate INT4."""
    int4 = options.settled(subject.numbers).quantize
    return int4.count or quantize.PROMPTS if int4.calibration != "none" else 0


def _training(ws: Workspace, options: CompressOptions, expected: PrunePlan) -> DistillOptions:
    """Return the options of the training of a plan."""
    training, calibration = options.distill or DistillOptions(), options.quantize.calibration
    return distill.seen_by_quantize(ws, training, calibration, expected)


def need_room(out: Path, source: Path, plan: PrunePlan, options: CompressOptions, *, no_half: bool = False) -> None:
    """Check that the disk has room for an artefact: transformers, text in INT4, and what of the rest is no link.

    Args:
        out: the artefact's folder, which need not exist.
        source: the pipeline's folder.
        plan: what is removed.
        options: of all stages.
        no_half: the pruned weights are not written in half precision.

    Raises:
        DiskError: the disk has less free space.
    """
    half = 0 if no_half else plan.after.bf16_bytes
    parts = {*text_encoders(source), "vae"}
    files = [path for path in model_files(source) if path.parent.name in parts and path.suffix == ".safetensors"]
    copied = sum(path.stat().st_size for path in files if not is_linked(path, out))
    text = encoders.written_bytes(source, options.text_form, options.quantize.group_size)
    need_space(out, half + plan.after.int4_bytes + text + copied)


def compress(
    ws: Workspace, options: CompressOptions, progress: Progress = silent, *, no_half: bool = False
) -> list[str]:
    """Run all stages; return the names of those that were not done yet.

    Args:
        ws: the workspace.
        options: of all stages.
        progress: called after each part of each stage.
        no_half: leave the pruned weights in half precision in the original; not with training.

    Raises:
        BudgetError: the budget cannot be met; raised before anything is computed.
        InputError: there is no data, or it is a cache that other encoders made; raised before anything is computed.
        DiskError: the disk has too little room; raised before anything is computed.
    """
    ran, options = list[str](), options.settled(ws.subject.numbers)
    options.check_data(world=ws.world)
    rehearsed = rehearse(ws.source, ws.generation, options)
    if options.distill is not None:
        options.distill.check()
        check_training(options, ws.original.compute)
        training = _training(ws, options, rehearsed)
        recipe = distill.recipe_of(training, rehearsed, ws.family, ws.config, ws.generation)
        if not recipe.states:  # with states, what is frozen is known once scores have made the plan
            tail.check(rehearsed, training, recipe, options.placement)
    need_memory(ws.memory, options, rehearsed, () if ws.fresh else ws.manifest.stages)
    if options.quantize.calibration != "none" and "quantize" not in ws.manifest.stages:
        count = options.quantize.count or quantize.PROMPTS
        quantize.check_time(ws, options.quantize, rehearsed, count, silent, counted_by=COUNTED_BY_COMPRESS)
    if ws.fresh or ENCODERS_STAGE not in ws.manifest.stages:
        encoders.check_time(ws, options.text_form, options.quantize.group_size, silent)
    if "prune" not in ws.manifest.stages:
        need_room(ws.out, ws.source, rehearsed, options, no_half=no_half)
    if options.distill is not None and options.data.source and is_cache(options.data.source):
        distill.check_cache(ws, Path(options.data.source), progress)
    if options.reads_scores and analyze.run(ws, options.analyze, progress):
        ran.append("analyze")
    if options.analyze.prompts and not options.reads_scores and options.plan.prompts is None:
        progress(
            f"--prompts: --method {options.plan.method} analyzes nothing, so {options.analyze.prompts} is not used"
        )
    if plan.run(ws, options.plan, progress=progress, encoders=options.text_form):
        ran.append("plan")
    if options.distill is None:
        ws.skip_distillation()
    # Without training and calibration, INT4 is made of what `prune` has just read.
    then = options.quantize if options.distill is None and options.quantize.calibration == "none" else None
    if prune.run(ws, progress, no_half=no_half, then=then):
        ran.append("prune")
    if options.distill is not None:
        training = _training(ws, options, ws.plan())
        if distill.run(ws, training, options.data, progress, placement=options.placement):
            ran.append("distill")
    if quantize.run(ws, options.quantize, progress, counted_by=COUNTED_BY_COMPRESS):
        ran.append("quantize")
    if encoders.run(ws, options.text_form, options.quantize.group_size, progress):
        ran.append(ENCODERS_STAGE)
    return ran
