"""The stage `analyze`: how much each block and component contributes, written to `analysis.json`."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.analysis.contribution import Group, analyze, groups, partials_of, swapped
from edgeprune.analysis.estimators import estimator_named
from edgeprune.artefact.resolve import read_original
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.families import Config, Family
from edgeprune.metrics import check_analysis, evaluations, of_pipeline, preparing
from edgeprune.metrics.velocity import VelocityError
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import held_bytes, is_streamed
from edgeprune.sampling.denoising import VelocityInputs, at_once, evaluate
from edgeprune.sampling.generation import Generation
from edgeprune.stages.calibration import stream_bytes
from edgeprune.stages.costs import sample
from edgeprune.stages.memory import Memory
from edgeprune.stages.modulation import modulation_mean
from edgeprune.stages.options import AnalyzeOptions, halvings, seen
from edgeprune.stages.original import Original
from edgeprune.stages.prompts import GIVEN, analysis_prompts
from edgeprune.stages.work import Subject, Work, encoding
from edgeprune.stages.workspace import Workspace


def analysis_groups(family: Family, config: Config, options: AnalyzeOptions) -> list[Group]:
    """Return the groups of parts whose removal is scored, one after the other.

    Raises:
        InputError: joint removals of components, without components.
    """
    if options.joint and not options.components:
        raise InputError("--joint removes components together; omit --only-blocks")
    return groups(family, config, components=options.components, joint=options.joint, pairs=options.pairs)


def run(ws: Workspace, options: AnalyzeOptions, progress: Progress = silent) -> bool:
    """Write contribution scores to `analysis.json`; return whether the stage ran.

    Raises:
        InputError: unknown estimator or metric, missing weights of the metric, or prompts that it is not made for.
        StaleStageError: see `Workspace.stage`.
    """
    options = options.chosen(ws.family, ws.config)
    estimator_class = estimator_named(options.estimator, options.metric)
    removals = analysis_groups(ws.family, ws.config, options)
    prompts = analysis_prompts(options, world=ws.world)
    check_analysis(options.metric, options.weights, prompts, world=ws.world)
    seeds = Split.ANALYSIS.seed(0)
    inputs = options.to_json() | {"prompts": prompts, "seeds": seeds, "generation": ws.generation.to_json()}
    if (dtype := ws.original.dtype) != torch.float32:  # small models are computed in float32 everywhere
        inputs["dtype"] = str(dtype)
    if not options.weights:
        del inputs["weights"]  # older folders do not have this option; they stay current
    if options.joint and ws.family.kinds(ws.config).get("single"):
        inputs["groups"] = len(removals)  # single-stream blocks had one joint group of three until 2026-11

    def score(key: str) -> dict[str, Any]:
        images, streamed = seen(ws.generation, options.states), is_streamed(ws.family.blocks(ws.pipe.transformer)[0])
        scratch = ws.cache / "analysis" / str(processes.index())
        spill = Spill(scratch, identity=key) if streamed else Spill()
        spill.need(_kept_bytes(ws, options, len(prompts)))
        metric = of_pipeline(
            options.metric, ws.pipe, images, prompts, options.weights, split=Split.ANALYSIS,
            world=ws.world, device=str(ws.original.compute.device), compares=estimator_class.compares, spill=spill,
            progress=lambda what, *parts: progress(f"analyze: {what}", *parts),
        )  # fmt: skip
        estimator = estimator_class(ws.family, metric, modulation_mean(ws, prompts))
        analyze(
            ws.family, ws.config, estimator.estimate, groups=removals, metric=metric.name, estimator=estimator.name,
            prompts=prompts, path=ws.report_path, inputs_digest=key,
            progress=lambda done, total: progress("analyze", done, total, ""),
        )  # fmt: skip
        ws.manifest.hash_files(ws.out, "analysis.json")
        return {GIVEN: options.prompts is not None}

    ran = ws.stage("analyze", inputs, score, check=lambda: _check_time(ws, options, removals, len(prompts), progress))
    for partial in partials_of(ws.report_path) if processes.is_main() else ():
        partial.unlink(missing_ok=True)
    if processes.is_main():
        shutil.rmtree(ws.cache / "analysis", ignore_errors=True)
    return ran


def _kept_bytes(ws: Workspace, options: AnalyzeOptions, count: int) -> int:
    """Return the bytes that gates keep on disk of `count` prompts: of a large model, the inputs of every block."""
    if options.estimator != "gates" or is_small(ws.subject.numbers):
        return 0
    latents, condition, *_ = sample(ws.family, ws.config, ws.source, ws.generation)
    one = stream_bytes(ws.family, ws.config, tuple(latents.shape[1:]), condition.hidden.shape[1])
    states = VelocityError.evaluations(seen(ws.generation, options.states), count)
    return states * (ws.family.block_count(ws.config) + 1) * one * ws.original.dtype.itemsize // 4


def _check_time(ws: Workspace, options: AnalyzeOptions, removals: list[Group], count: int, progress: Progress) -> None:
    """Say what an analysis of `count` prompts takes, and refuse what takes too long; see `Workspace.check_time`."""

    def total(chosen: AnalyzeOptions, prompts: int) -> Work:
        return work(ws.subject, chosen, removals, prompts)

    fewest, option, ways = options, "", []
    if options.estimator != "gates" and options.metric == VelocityError.name:
        fewest, option = replace(options, estimator="gates"), "--estimator gates "
        ways.append((option.strip(), total(fewest, count)))
    ways += [(f"{option}--count {fewer}", total(fewest, fewer)) for fewer in halvings(count)]
    if options.metric == VelocityError.name:
        ways.append((f"{option}--count 1 --states 1", total(replace(fewest, states=1), 1)))
    kept, needed = _kept_bytes(ws, options, count), memory(ws.memory, options, count)
    ws.check_time("analyze", total(options, count), ways, progress, memory=needed, written=kept)


def memory(of: Memory, options: AnalyzeOptions, count: int) -> int:
    """Return the bytes that `run` takes at least, with `count` prompts; a metric's own networks are not counted."""
    if options.metric != VelocityError.name:
        return of.drawing(count)
    states = VelocityError.evaluations(seen(of.subject.generation, options.states), count)
    return of.evaluating(count, states=states, gradients=options.estimator == "gates")


def work(subject: Subject, options: AnalyzeOptions, removals: list[Group], count: int) -> Work:
    """Return the work of `run`.

    Args:
        subject: the original.
        options: of the analysis, with the estimator chosen.
        removals: the groups of parts that are scored.
        count: number of prompts.
    """
    estimator, by_step = estimator_named(options.estimator, options.metric), subject.by_step
    generation, blocks = seen(subject.generation, options.states), subject.family.block_count(subject.config)
    per_score = evaluations(options.metric, generation, count, by_step)
    before = preparing(options.metric, generation, count, by_step)
    compared = per_score if estimator.compares and options.metric == VelocityError.name else 0
    streamed = not is_small(subject.numbers)
    scored = estimator.evaluations([(), *removals], blocks, per_score, streamed=streamed)
    return Work(evaluations=scored + before + compared) + encoding(subject, count + 1)


def forecast(
    source: Path,
    options: AnalyzeOptions,
    generation: Generation,
    variant: str | None = None,
    compute: ComputeOptions | None = None,
) -> dict[str, Any]:
    """Forecast what `analyze` would cost, from one timed evaluation where and as it would run.

    Evaluations are of one sample; in batches each takes less time.

    Args:
        source: the pipeline's folder.
        options: of the analysis.
        generation: how images are made.
        variant: of the weights, see residency/model_files.py.
        compute: where networks run, and in how much memory; None takes what this machine has.

    Returns:
        Numbers with units in their names. `weights_bytes` is what the transformer has in memory while it runs.
        `held_bytes` is what the estimator keeps, without the weights and without the activations of a forward pass.

    Raises:
        InputError: an option or a config is not usable.
    """
    config, family = read_original(source)
    options = options.chosen(family, config)
    estimator = estimator_named(options.estimator, options.metric)
    removals = analysis_groups(family, config, options)
    subject, blocks = Subject(source, family, config, generation), family.block_count(config)
    count = len(analysis_prompts(options, world=subject.world))
    per_score = evaluations(options.metric, seen(generation, options.states), count, subject.by_step)
    total = work(subject, options, removals, count).evaluations
    original = Original(source, variant, Compute.of(compute or ComputeOptions()))
    model = original.transformer
    one = sample(family, config, source, generation)
    of_block, evaluation_s = _measure(family, model, one)
    saved = _saved_bytes(family, model, one) if estimator.backward else 0
    together, streamed = at_once(model, one[0].shape[1:]), is_streamed(family.blocks(model)[0])
    return {
        "blocks": blocks,
        "groups": len(removals) + 1,
        "evaluations": round(total),
        "evaluation_s": round(evaluation_s, 4),
        "analysis_s": round(total * evaluation_s, 1),
        "weights_bytes": held_bytes(model),
        "held_bytes": estimator.extra_bytes(of_block, saved, per_score, together, streamed=streamed),
    }


def _measure(family: Family, model: Any, one: VelocityInputs) -> tuple[int, float]:
    """Evaluate one sample twice; return the bytes of a block's output, and the seconds of the second evaluation."""
    stream_bytes = list[int]()

    def count_bytes(_: Any, __: Any, out: Any) -> None:
        stream_bytes.append(sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if t is not None))

    with torch.no_grad():
        handle = family.blocks(model)[0].register_forward_hook(count_bytes)
        evaluate(model, *one)
        handle.remove()
        began = time.perf_counter()
        evaluate(model, *one)
        return stream_bytes[0], time.perf_counter() - began


def _saved_bytes(family: Family, model: Any, one: VelocityInputs) -> int:
    """Return what autograd keeps of one sample for the backward pass, where weights need no gradients.

    Of a streamed model that is all of the block that is run again, and of what is outside the blocks.
    """
    blocks = family.blocks(model)
    if not is_streamed(blocks[0]):
        return _saved_now(model, one)
    nowhere = torch.empty(0)  # whole blocks are removed, which needs no mean
    others = [family.removal(model, index, None, nowhere)[0] for index in range(1, len(blocks))]
    with swapped(others):
        return _saved_now(model, one)


def _saved_now(model: Any, one: VelocityInputs) -> int:
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.is_meta}

    def count_storage(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not isinstance(tensor, torch.nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents, condition, sigma, guidance = one
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count_storage, lambda tensor: tensor):
        # Keep the result: freed storages would be reused, and counted as one.
        result = evaluate(model, latents.requires_grad_(), condition, sigma, guidance)
    del result
    return sum(saved.values())
