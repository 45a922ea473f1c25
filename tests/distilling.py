"""A tiny teacher, its pruned student, plan, scores and data: shared by the tests of training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from tiny import KINDS, TOKENS, config_of, tiny_inputs, tiny_transformer

from edgeprune.analysis.contribution import ContributionReport, fingerprint
from edgeprune.artefact.surgery import prune
from edgeprune.data.pairs import Pairs, Samples
from edgeprune.families import family_of, family_of_model
from edgeprune.planning.make import make_plan
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import model_inputs, velocity
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.training.recipe import DistillOptions, Recipe
from edgeprune.training.states import StateBatch
from edgeprune.training.whole import Noisy, distill, noisy


def recipe(options: DistillOptions) -> Recipe:
    """Return the recipe of a plan of whole blocks, with the options on top and a tenth of the captions dropped."""
    return options.over(Recipe(sensitivity="graded", drop_captions=0.1))


def schedule(teacher: Any, *, shift: float = 3.0, steps: int = 4) -> NoiseSchedule:
    """Return the noise levels of a tiny model with a constant shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return NoiseSchedule(FlowMatch.of(scheduler), family_of_model(teacher), config_of(teacher), steps)


def setup(kind: str = "sd3") -> tuple[Any, Any, Any, PrunePlan, ContributionReport, Pairs]:
    """Return models with five blocks of which the third is pruned; for FLUX that is the first single block."""
    teacher = tiny_transformer(num_layers=5) if kind == "sd3" else KINDS[kind]()
    config = config_of(teacher)
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", blocks="2")
    student = prune(family, teacher, config, plan, None)
    student.load_state_dict({n: t.clone() for n, t in student.state_dict().items()}, assign=True)
    drops = {(b, c): float(b) for b in range(5) for c in family.components if (b, c) not in family.noops(config)}
    scores = {(k,): [-d] for k, d in drops.items()}
    report = ContributionReport(fingerprint(config), family.name, 5, "m", ["p"], [0.0], scores)
    g = torch.Generator().manual_seed(3)
    width = tiny_inputs()["pooled_projections"].shape[-1]
    samples = Samples(
        torch.randn(16, 8, 8, 8, generator=g), torch.arange(16) % 4,
        torch.randn(4, TOKENS, width, generator=g), torch.randn(4, width, generator=g),
    )  # fmt: skip
    return family, teacher, student, plan, report, Pairs([samples])


def streams_before(family: Any, model: Any, first: int, batch: Noisy, guidance: float) -> dict[str, Any]:
    """Return what `StateBatch` holds of a batch before a block of a model."""
    with torch.no_grad():
        inputs = model_inputs(model, batch.latents, batch.condition, batch.sigma, guidance)
        image, text, modulation = family.embed(model, inputs)
        positions = family.positions(model, inputs)
        for block in family.blocks(model)[:first]:
            image, after = family.run(block, image, text, modulation, positions)
            text = text if after is None else after
    return {
        "streams": {"image": image, "text": text, "modulation": modulation}, "positions": tuple(positions),
        "grid": tuple(family.grid(model, inputs)),
    }  # fmt: skip


def states(teacher: Any, plan: PrunePlan, pairs: Pairs, options: DistillOptions, guidance: float) -> StateBatch:
    """Return states for a student whose prefix is the teacher's own."""
    family = family_of_model(teacher)
    drawn = noisy(pairs, replace(options, batch=16), recipe(options), schedule(teacher), 0)
    with torch.no_grad():
        answer = velocity(teacher, drawn.latents, drawn.condition, drawn.sigma, guidance)
    return StateBatch(
        velocity=answer, target=drawn.velocity,
        **streams_before(family, teacher, plan.first_pruned, drawn, guidance),
    )  # fmt: skip


def saved(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a training state: state dicts by name, and the meta."""
    with safe_open(path, framework="pt") as file:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for full in file.keys():  # noqa: SIM118
            name, _, key = full.partition("/")
            modules.setdefault(name, {})[key] = file.get_tensor(full)
        return modules, json.loads(file.metadata()["meta"])


def run(
    path: Path, steps: int, *, kind: str = "sd3", until: int | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    family, teacher, student, plan, report, pairs = setup(kind)

    class Killed(Exception):
        pass

    def progress(step: int, total: int, loss: float) -> None:
        if step == until:
            raise Killed

    chosen = DistillOptions(steps=steps, batch=4, rate=1e-3, **options)
    try:
        return distill(
            family,
            teacher,
            student,
            plan,
            report,
            pairs,
            chosen,
            recipe(chosen),
            schedule(teacher),
            path,
            inputs_digest="x",
            guidance=3.5,
            save_every=2,
            progress=progress,
        )
    except Killed:
        return {}, []
