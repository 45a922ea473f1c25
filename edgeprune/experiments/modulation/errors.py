"""Velocity errors of the model with projected modulation: by rank, storage, calibration, timestep and guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgeprune.common.splits import Split
from edgeprune.experiments.modulation.study import Study
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.modulation import GRID, choose_rank, subspace
from edgeprune.quantization.precision import Precision
from edgeprune.quantization.quantize import round_to_nearest
from edgeprune.sampling.denoising import Conditioning, encode_images, encode_prompts, noise, velocity

RANKS = (0, 2, 4, 8, 16, 32, 48, 64)
CALIBRATED = (16, 32, 64)
"""Ranks for which the study varies the calibration."""


def ranks(study: Study) -> dict[str, dict[str, float]]:
    """Return the error by rank, in float32 and after INT4, and the share of held-out inputs outside the basis."""
    inputs = study.inputs(["", *study.held_out]).flatten(0, 1)
    left = study.usual.residuals(inputs)
    rows: dict[str, dict[str, float]] = {}
    for rank in RANKS:
        model = study.thin(rank)
        rows[str(rank)] = {"float32": study.error(model), "residual": float(left[rank])}
        if rank >= 8:
            rows[str(rank)]["int4"] = study.error(study.rounded(model))
    rows["full"] = {"float32": 0.0, "residual": 0.0}
    rows["full"]["int4"] = study.error(study.rounded(copy.deepcopy(study.teacher)))
    return rows


def storage(study: Study) -> dict[str, float]:
    """Return the error at rank 32 with one thing rounded at a time, all else in float32."""
    rows = {"nothing rounded": study.error(study.thin(32))}
    model = study.thin(32)
    integers, scale = round_to_nearest(model.time_text_embed.basis.detach(), Precision(8, study.usual.mean.numel()))
    with torch.no_grad():
        model.time_text_embed.basis.copy_(integers * scale.float())
    rows["basis in 8 bits"] = study.error(model)
    rows["everything in half precision"] = study.error(study.thin(32).half().float())
    for bits, group in ((8, 32), (4, 32), (4, 16)):
        model = study.rounded(study.thin(32), Precision(bits, group))
        rows[f"thin layers in {bits} bits, groups of {group}"] = study.error(model)
    rows["the original's modulation in 4 bits, groups of 64"] = study.error(
        study.rounded(copy.deepcopy(study.teacher), Precision(4, 64))
    )
    return rows


def calibration(study: Study) -> dict[str, dict[str, float]]:
    """Return the error on held-out captions by what the basis was calibrated on."""
    usual = ["", *study.captions()]
    many = f"{len(usual) - 1} captions"
    choices: dict[str, torch.Tensor] = {
        f"{study.tasks * n} captions": study.inputs(["", *study.captions(n)]) for n in (1, 2, 4, 8, 16, 32)
    }
    choices[f"{many}, sampler's timesteps only"] = study.inputs(usual, study.levels)
    choices[f"{many}, four timesteps only"] = study.inputs(usual, study.levels[::5])
    choices[f"{many}, even grid only"] = study.inputs(usual, torch.linspace(0, 1, GRID))
    choices[f"{many} without the empty one"] = study.inputs(usual[1:])
    rows: dict[str, dict[str, float]] = {}
    for name, inputs in choices.items():
        basis = subspace(inputs.flatten(0, 1))
        rows[name] = {str(r): study.error(study.thin(r, basis)) for r in CALIBRATED if r <= len(basis.directions)}
    return rows


def auto(study: Study) -> dict[str, int | None]:
    """Return the rank that `auto` chooses by the number of captions it sees, apart from the empty one."""
    width = study.usual.mean.numel()
    return {
        str(study.tasks * n): choose_rank(study.inputs(["", *study.captions(n)]), width) for n in (1, 2, 4, 8, 16, 32)
    }


def seen(study: Study) -> dict[str, dict[str, float]]:
    """Return the error on captions of the calibration and on held-out ones."""
    other = VelocityError(study.pipe, study.generation, study.captions(3), split=Split.CALIBRATION)
    rows: dict[str, dict[str, float]] = {}
    for rank in CALIBRATED:
        model = study.thin(rank)
        rows[str(rank)] = {"seen": study.error(model, other), "held out": study.error(model)}
    return rows


@torch.no_grad()
def timesteps(study: Study) -> dict[str, dict[str, float]]:
    """Return the error at single timesteps, on scenes mixed with noise; prompts held out."""
    texts = study.held_out
    world = study.world
    pictures = [p.meaning for p in world.grammar.evaluation_prompts(3)]
    images = np.stack([world.render(m, np.random.default_rng(i)) for i, m in enumerate(pictures)])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    clean = encode_images(study.pipe, tensor)
    fresh = noise(Split.HELD_OUT.seeds(len(texts)), tuple(clean.shape[1:]))
    condition = encode_prompts(study.pipe, texts, study.generation.max_sequence_length)
    rows: dict[str, dict[str, float]] = {}
    sampler = subspace(study.inputs(["", *study.captions()], study.levels).flatten(0, 1))
    models = {"32": study.thin(32), "64": study.thin(64), "32, sampler's timesteps only": study.thin(32, sampler)}
    for t in (1000, 995, 950, 800, 500, 200, 50, 5, 0):
        states = torch.lerp(clean, fresh, t / 1000)
        sigma = torch.full((len(texts),), t / 1000)

        def at(model: Any, states: torch.Tensor = states, sigma: torch.Tensor = sigma) -> torch.Tensor:
            return velocity(model, states, condition, sigma, study.generation.guidance_scale)

        target = at(study.teacher)
        rows[str(t)] = {n: _relative(at(m), target) for n, m in models.items()}
    return rows


@torch.no_grad()
def guidance(study: Study) -> dict[str, dict[str, float]]:
    """Return the error of the guided velocity by scale, with and without the empty prompt in the calibration."""
    without = subspace(study.inputs(study.captions()).flatten(0, 1))
    models = {f"{r}": study.thin(r) for r in (16, 32)}
    models |= {f"{r}, without the empty prompt": study.thin(r, without) for r in (16, 32)}
    m = study.metric
    empty = encode_prompts(study.pipe, [""], study.generation.max_sequence_length)
    free = Conditioning(empty.hidden.expand_as(m.condition.hidden), empty.pooled.expand_as(m.condition.pooled))

    def both(model: Any) -> list[torch.Tensor]:
        return [velocity(model, m.states, c, m.sigmas, m.guidance) for c in (m.condition, free)]

    bound, unbound = both(study.teacher)
    velocities = {name: both(model) for name, model in models.items()}
    return {
        str(scale): {
            n: _relative(u + scale * (b - u), unbound + scale * (bound - unbound)) for n, (b, u) in velocities.items()
        }
        for scale in (1, 2, 4, 7)
    }


def _relative(result: torch.Tensor, target: torch.Tensor) -> float:
    return float((result - target).norm() / target.norm())


ERRORS: dict[str, Callable[[Study], Any]] = {
    "calibration": calibration,
    "auto": auto,
    "storage": storage,
    "guidance": guidance,
    "timesteps": timesteps,
}
"""Measurements besides `ranks` and `seen`, by their key in study.json, in the order that they run."""
