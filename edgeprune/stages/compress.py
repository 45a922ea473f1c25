"""All stages in their order: analyze -> plan -> prune -> distill -> quantize; their presets, and what they would cost.

The forecast of `compress` needs configs only, no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.analysis.contribution import ContributionReport, fingerprint, groups
from edgeprune.artefact.resolve import BUILTIN, read_original
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.files import need_space
from edgeprune.common.linking import is_linked
from edgeprune.common.progress import Progress, silent
from edgeprune.data.cache import is_cache
from edgeprune.data.settings import SHAPES, is_drawn
from edgeprune.families.encoders import text_encoders
from edgeprune.metrics import check_analysis
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import Scored, methods
from edgeprune.planning.modulation import ranks
from edgeprune.planning.options import DEFAULT, NEEDED
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import is_projectable, modulation_width
from edgeprune.residency.model_files import model_files
from edgeprune.sampling.generation import Generation
from edgeprune.stages import analyze, distill, plan, prune, quantize
from edgeprune.stages.costs import (
    evaluations_per_step,
    flops_per_evaluation,
    matmul_flops_per_s,
    transformer_bytes,
)
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.prompts import analysis_prompts
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions


def preset(name: str, *, builtin: bool, data: str | None = None) -> CompressOptions:
    """Return the options of a preset: `default`, or `quick` for a first look and for CI.

    Without data, a model other than the built-in one is not distilled: nothing that comes with edgeprune stands for the
    images that it should draw. The paper trained 64,000 steps of 64 on YE-POP; the default is 1,000 steps of 32.

    The built-in model is small and takes a larger learning rate. It loses components rather than blocks: it hardly uses
    its context MLPs, and at the same bytes much more of the velocity is kept (README.md has the figures).

    Args:
        name: of the preset.
        builtin: whether the model is the built-in one.
        data: what to train on, see DataOptions.

    Raises:
        InputError: unknown name.
    """
    if name not in ("default", "quick"):
        raise InputError(f"--preset: found {name!r}, expected default or quick")
    options = CompressOptions(plan=DEFAULT, data=DataOptions(data), distill=DistillOptions() if data else None)
    if builtin:
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
        InputError: the metric is unknown, or its weights are missing.
    """
    check_analysis(options.analyze.metric, options.analyze.weights)
    config, family = read_original(source)
    rank = options.plan.modulation_rank
    if rank == NEEDED and not is_projectable(family, config):
        rank = None
    if isinstance(rank, str):
        rank = ranks(modulation_width(family, config))[0]
    return _plan_alike(source, generation, options, rank)


def expected_plan(source: Path, generation: Generation, options: CompressOptions) -> PrunePlan:
    """Return the plan that a forecast counts: all parts contribute alike, as in `rehearse`.

    A modulation rank that has to be measured counts as the largest one that meets the budget, so no size, time or
    memory is understated. NEEDED counts as unprojected where that suffices.

    Raises:
        BudgetError: no plan with these options meets the budget.
        InputError: see `rehearse`.
    """
    smallest = rehearse(source, generation, options)
    if not isinstance(options.plan.modulation_rank, str) or smallest.modulation_rank is None:
        return smallest

    def plan_with(rank: int | None) -> PrunePlan:
        return _plan_alike(source, generation, options, rank)

    if options.plan.modulation_rank == NEEDED and plan.suffices(plan_with):
        return plan_with(None)
    config, family = read_original(source)
    for rank in reversed(ranks(modulation_width(family, config))):
        try:
            return plan_with(rank)
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
    return make_plan(family, config, report, choices, plan.budget_for(source, generation, choices), even)


def forecast(
    source: Path, options: CompressOptions, generation: Generation, *, no_half: bool = False
) -> dict[str, Any]:
    """Forecast what `compress` would cost: work, least time on this machine, memory of weights, and bytes written.

    Analysis holds a small transformer, and of a large one as many blocks as there is room for; the least is counted.
    Activations and the report's images are not counted. See costs.py for the work and the time.

    Args:
        source: the pipeline's folder.
        options: of all stages.
        generation: how images are made.
        no_half: see `compress`.

    Returns:
        Numbers with units in their names.

    Raises:
        BudgetError: the budget cannot be met, whatever the scores.
        InputError: an option or a config is not usable.
    """
    config, family = read_original(source)
    expected = expected_plan(source, generation, options)
    before, after = expected.before, expected.after

    analysis = options.analyze.chosen(family, config)
    removals = analyze.analysis_groups(family, config, analysis)
    per_step, blocks = evaluations_per_step(family, config, generation), family.block_count(config)
    prompts = len(analysis_prompts(analysis, builtin=source == BUILTIN))
    scored = round(analyze.work(analysis, generation, removals, prompts, per_step, blocks))
    training = options.distill
    frozen = training is not None and distill.recipe_of(training, expected, family, config, generation).freeze_prefix
    drawn_images = options.data.samples if training and is_drawn(options.data.source or SHAPES) else 0
    drawn = drawn_images * generation.num_inference_steps * per_step
    flops = flops_per_evaluation(family, config, source, generation)
    speed = matmul_flops_per_s()
    return {
        "blocks": blocks,
        "parameters": before.parameters,
        "parameters_left": after.parameters,
        "int4_bytes": after.int4_bytes,
        "analyze_parts": 1 + len(removals),
        "analyze_prompts": prompts,
        "analyze_evaluations": scored,
        "analyze_floor_s": round(scored * flops / speed, 1),
        "distill_steps": training.steps if training else 0,
        "data_evaluations": drawn,
        "data_floor_s": round(drawn * flops / speed, 1),
        "distill_floor_s": round(_training_evaluations(training, expected, frozen) * flops / speed, 1),
        "evaluation_flops": flops,
        "matmul_flops_per_s": round(speed),
        "analyze_weights_bytes": transformer_bytes(family, config),
        "distill_weights_bytes": _training_bytes(training, expected),
        "written_bytes": (0 if no_half else after.bf16_bytes) + after.int4_bytes,
    }


def need_room(out: Path, source: Path, plan: PrunePlan, *, no_half: bool = False) -> None:
    """Check that the disk has room for an artefact: both transformers, and what of encoders and VAE is not linked.

    Args:
        out: the artefact's folder, which need not exist.
        source: the pipeline's folder.
        plan: what is removed.
        no_half: the pruned weights are not written in half precision.

    Raises:
        DiskError: the disk has less free space.
    """
    half = 0 if no_half else plan.after.bf16_bytes
    parts = {*text_encoders(source), "vae"}
    files = [path for path in model_files(source) if path.parent.name in parts and path.suffix == ".safetensors"]
    copied = sum(path.stat().st_size for path in files if not is_linked(path, out))
    need_space(out, half + plan.after.int4_bytes + copied)


def _training_evaluations(training: DistillOptions | None, expected: PrunePlan, frozen_prefix: bool) -> float:
    """Return the work of the training steps, in evaluations of the teacher.

    A sample takes one evaluation of the teacher and three of the student: forward, and twice that backward. A frozen
    prefix runs forward only; a student whose weights are not rounded takes the prefix's result from the teacher.
    """
    if training is None:
        return 0
    share = expected.after.parameters / expected.before.parameters
    prefix = expected.first_pruned / expected.num_blocks if frozen_prefix else 0.0
    student_prefix = prefix if training.int4_group_size is not None else 0.0
    return training.steps * training.batch * (1 + student_prefix + 3 * max(0.0, share - prefix))


def _training_bytes(training: DistillOptions | None, expected: PrunePlan) -> int:
    """Return the bytes of the tensors that training holds in float32; 0 without training.

    They are the teacher's weights and, in the student's size, its weights, gradients, two moments, the average and,
    where training rounds, the rounded weights.
    """
    if training is None:
        return 0
    copies = 5 + (training.int4_group_size is not None)
    return 2 * expected.before.bf16_bytes + copies * 2 * expected.after.bf16_bytes


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
    ran = []
    options.check_data(builtin=ws.builtin)
    rehearsed = rehearse(ws.source, ws.generation, options)
    if "prune" not in ws.manifest.stages:
        need_room(ws.out, ws.source, rehearsed, no_half=no_half)
    if options.distill is not None and options.data.source and is_cache(options.data.source):
        distill.check_cache(ws, Path(options.data.source), progress)
    if options.reads_scores and analyze.run(ws, options.analyze, progress):
        ran.append("analyze")
    if options.analyze.prompts and not options.reads_scores and options.plan.prompts is None:
        progress(
            f"--prompts: --method {options.plan.method} analyzes nothing, so {options.analyze.prompts} is not used"
        )
    if plan.run(ws, options.plan):
        ran.append("plan")
    if options.distill is None:
        ws.skip_distillation()
    # Without training and calibration, INT4 is made of what `prune` has just read.
    then = options.quantize if options.distill is None and options.quantize.calibration == "none" else None
    if prune.run(ws, progress, no_half=no_half, then=then):
        ran.append("prune")
    if options.distill is not None and distill.run(ws, options.distill, options.data, progress):
        ran.append("distill")
    if quantize.run(ws, options.quantize, progress):
        ran.append("quantize")
    return ran
