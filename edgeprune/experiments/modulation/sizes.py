"""Ways to make the model smaller at equal bytes: velocity error and scored images, with and without distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.surgery import prune
from edgeprune.common.splits import Split
from edgeprune.experiments.modulation.study import Study, print_progress
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.planning.make import make_plan
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import generate
from edgeprune.shapes import Prompt, World, score
from edgeprune.stages.compress import preset
from edgeprune.stages.distill import run as run_distill
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace


@dataclass(frozen=True)
class Variant:
    """One way to make the model smaller."""

    series: str
    plan: PlanOptions
    distilled: bool = False


def variants() -> dict[str, Variant]:
    """Return the variants by name, in the order of measuring; those that need training are last."""
    parts = PlanOptions(method="hybrid", threshold=0.0, protect_first=0)  # as the built-in model's preset
    whole = PlanOptions(method="hpp", protect_first=0)
    out = {"int4": Variant(series="INT4 alone", plan=PlanOptions(method="hpp", keep=1.0))}

    def add(keep: float) -> None:
        out[f"parts-{keep}"] = Variant(series="components only", plan=replace(parts, keep=keep))
        out[f"both-{keep}"] = Variant(
            series="modulation, then components", plan=replace(parts, keep=keep, modulation_rank=32)
        )

    def project(rank: int) -> None:
        out[f"modulation-{rank}"] = Variant(
            series="modulation only", plan=PlanOptions(method="manual", modulation_rank=rank)
        )

    project(32)
    add(0.65)
    add(0.5)
    project(16)
    out["blocks-0.8"] = Variant(series="blocks only", plan=replace(whole, keep=0.8))
    out["both-blocks-0.65"] = Variant(
        series="modulation, then blocks", plan=replace(whole, keep=0.65, modulation_rank=32)
    )
    project(64)
    add(0.58)
    for name in ("parts-0.5", "both-0.5", "parts-0.65", "both-0.65"):
        out[f"{name}-distilled"] = replace(out[name], distilled=True)
    return out


def smaller(study: Study, name: str, variant: Variant) -> tuple[PrunePlan, Any]:
    """Return a variant's plan and its model rounded to INT4; a distilled one runs the stages of `compress`."""
    if not variant.distilled:
        report = ContributionReport.load(study.base.report_path)
        plan = make_plan(study.family, study.config, report, variant.plan)
        basis = study.usual.basis(plan.modulation_rank) if plan.modulation_rank else None
        model = prune(study.family, study.teacher, study.config, plan, study.usual.mean, basis)
        return plan, study.rounded(model)
    ws = Workspace(study.out / "variants" / name, study.model)
    options = preset("default", world=study.world)
    assert options.distill is not None
    run_plan(ws, variant.plan, study.base.report_path)
    run_prune(ws)
    ws.cache = study.out / "cache"  # all variants train on the same images
    distill, data = replace(options.distill, steps=study.steps), replace(options.data, samples=2000)
    run_distill(ws, distill, data, print_progress)
    run_quantize(ws, options.quantize)
    return ws.plan(), load_transformer(ws.out, quantized=True)


def measure_variant(study: Study, name: str, variant: Variant) -> dict[str, Any]:
    """Return what the variant removes, its bytes and its velocity error."""
    plan, model = smaller(study, name, variant)
    row: dict[str, Any] = {"series": variant.series, "distilled": variant.distilled, "rank": plan.modulation_rank}
    row |= {"blocks": plan.blocks, "components": len(plan.components)}
    row |= {"parameters": plan.after.parameters, "int4_bytes": plan.after.int4_bytes}
    return row | {"error": study.error(model)}


def judge_variant(study: Study, name: str, variant: Variant) -> dict[str, Any]:
    """Return `judged` of a variant."""
    return judged(study, name, smaller(study, name, variant)[1])


def scored(study: Study) -> list[Prompt]:
    """Return the held-out captions whose images are checked."""
    return study.world.grammar.evaluation_prompts(study.per_task)


def judged(study: Study, name: str, model: Any) -> dict[str, Any]:
    """Return the score with its interval, prompts lost and won against the teacher, and the PSNR to its images."""
    original, made = _images(study, "teacher", study.teacher), _images(study, name, model)
    prompts = scored(study)
    first, other = (_passed(images, prompts, study.world) for images in (original, made))
    tasks = [p.meaning.task for p in prompts]
    return {
        "score": score(other, tasks),
        "lost": int(((first == 1) & (other == 0)).sum()),
        "won": int(((first == 0) & (other == 1)).sum()),
        "psnr_db": mean_decibels(list(original), list(made)),
        "images": len(made),
    }


def _images(study: Study, name: str, model: Any) -> NDArray[np.uint8]:
    """Return one image per scored caption, (P, H, W, 3); kept on disk."""
    path = study.out / "images" / f"{name}-{study.per_task}.npy"
    if not path.is_file():
        study.pipe.transformer = model
        texts = [p.text for p in scored(study)]
        made = generate(study.pipe, texts, Split.HELD_OUT.seeds(len(texts)), study.generation)
        study.pipe.transformer = study.teacher
        path.parent.mkdir(exist_ok=True)
        np.save(path, made)
    loaded: NDArray[np.uint8] = np.load(path)
    return loaded


def _passed(images: NDArray[np.uint8], prompts: list[Prompt], world: World) -> NDArray[np.float64]:
    return np.asarray([float(world.check(i, p.meaning)) for i, p in zip(images, prompts, strict=True)])
