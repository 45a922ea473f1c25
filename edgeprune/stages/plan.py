"""The stage `plan`: what is removed, written to `plan.json`, and where the modulation is projected, its basis."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgeprune import targets
from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.files import sha256_file, write_json, write_text
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import save_tensors
from edgeprune.planning.fit import fit
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import baselines
from edgeprune.planning.modulation import GRID, choose_rank, subspace
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width
from edgeprune.planning.removable import Removable
from edgeprune.quantization.precision import TEXT_INT4
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import read_prompts
from edgeprune.stages.modulation import MODULATION, inputs_of, is_guided, sampler_levels
from edgeprune.stages.prompts import analyzed_or_split
from edgeprune.stages.weights import original_weights
from edgeprune.stages.work import Work, encoding
from edgeprune.stages.workspace import Workspace


def calibration_inputs(ws: Workspace, prompts: list[str]) -> torch.Tensor:
    """Return the modulation inputs (prompts, T, D) at the sampler's T noise levels and an even grid of GRID more."""
    return inputs_of(ws, prompts, torch.cat([sampler_levels(ws), torch.linspace(0, 1, GRID)]))


def block_magnitudes(ws: Workspace) -> list[float]:
    """Return the root mean square of each block's weights, read one tensor at a time."""
    weights = original_weights(ws)
    squares, counts = [0.0] * ws.family.block_count(ws.config), [0] * ws.family.block_count(ws.config)
    for name in weights.shapes:
        place = ws.family.place(ws.config, name)
        if place is not None:
            tensor = weights[name]
            squares[place[0]] += float(tensor.float().square().sum(dtype=torch.float64))
            counts[place[0]] += tensor.numel()
    return [math.sqrt(s / c) for s, c in zip(squares, counts, strict=True)]


def magnitudes_for(ws: Workspace, options: PlanOptions) -> list[float]:
    """Return the magnitude of each block for a baseline that reads weights; for other methods, none."""
    baseline = baselines().get(options.method)
    return block_magnitudes(ws) if baseline is not None and baseline.magnitudes else []


def budget_for(source: Path, generation: Generation, options: PlanOptions, encoders: str = TEXT_INT4) -> int | None:
    """Return the bytes that the device of `options.fit` leaves for the transformer; None where no device is named.

    Args:
        source: the pipeline's folder.
        generation: how images are made.
        options: of the plan.
        encoders: how a T5 or Qwen3 is exported, one of precision.ENCODERS.
    """
    if options.fit is None:
        return None
    return fit(source, targets.load(options.fit), generation, encoders).transformer_bytes


def run(
    ws: Workspace,
    options: PlanOptions,
    scores: Path | None = None,
    progress: Progress = silent,
    *,
    encoders: str = TEXT_INT4,
) -> bool:
    """Write `plan.json`, and MODULATION where the modulation is projected; return whether the stage ran.

    Args:
        ws: the workspace.
        options: of the plan.
        scores: a file of contribution scores to use instead of the folder's own.
        progress: gets a line that says what measuring the modulation takes.
        encoders: how a T5 or Qwen3 is exported, one of precision.ENCODERS; a budget by a device's memory counts it.

    Raises:
        BudgetError: the budget cannot be met.
        InputError: an option or the scores are not usable.
        StaleStageError: see `Workspace.stage`.
    """
    options.check()
    Removable.of(ws.family, ws.config, options)  # a wrong option is refused before anything is measured or removed
    budget = budget_for(ws.source, ws.generation, options, encoders)
    rank = options.modulation_rank
    prompts: list[str] = []
    given_for_maps = options.stand_in is not None and options.prompts is not None  # `prune` fits them on these
    if rank is not None or given_for_maps:
        found = read_prompts(Path(options.prompts)) if options.prompts else analyzed_or_split(ws)
        prompts = [*([""] if is_guided(ws) else []), *found]

    def write(_: str) -> dict[str, Any]:
        (ws.out / MODULATION).unlink(missing_ok=True)
        ws.scores_path.unlink(missing_ok=True)
        if scores:
            ContributionReport.load(scores)  # refuse an unusable file before it is copied
            write_text(ws.scores_path, scores.read_text(encoding="utf-8"))
        magnitudes = magnitudes_for(ws, options)

        def plan_with(modulation_rank: int | None) -> PrunePlan:
            chosen = replace(options, modulation_rank=modulation_rank)
            return make_plan(ws.family, ws.config, ws.report(), chosen, budget, magnitudes)

        samples, chosen_rank = None, rank if isinstance(rank, int) else None
        if rank is not None:
            samples = calibration_inputs(ws, prompts)
            if chosen_rank is None:
                chosen_rank = choose_rank(samples, modulation_width(ws.family, ws.config))
        plan = plan_with(chosen_rank)
        if samples is not None and chosen_rank is not None:
            space = subspace(samples.flatten(0, 1))
            save_tensors(ws.out / MODULATION, {"mean": space.mean, "basis": space.basis(chosen_rank)})
        write_json(ws.out / "plan.json", plan.to_json())
        for name in ("plan.json", MODULATION):
            ws.manifest.hash_files(ws.out, name)
        return {"modulation_rank": chosen_rank}

    scores_identity = sha256_file(scores) if scores and scores.is_file() else str(scores)
    inputs = options.to_json() | {"fit_bytes": budget, "scores": scores_identity}
    if prompts:
        inputs |= {"calibration": prompts, "generation": ws.generation.to_json()}
    return ws.stage("plan", inputs, write, check=lambda: _check_time(ws, prompts if rank is not None else [], progress))


def _check_time(ws: Workspace, prompts: list[str], progress: Progress) -> None:
    """Say what measuring the modulation takes, if prompts are encoded for it."""
    if prompts:
        needed = ws.memory.encoding(len(prompts), pooled=True)
        ways = [("--modulation-rank full", Work())]
        ws.check_time("plan", encoding(ws.subject, len(prompts), pooled=True), ways, progress, memory=needed)
