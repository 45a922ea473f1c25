"""The models of the study and its results, each measured once and kept in `study.json`, so that a run can resume."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.artefact.surgery import prune
from edgeprune.common.files import read_json, write_json
from edgeprune.common.splits import Split
from edgeprune.experiments.teachers import Teacher
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.make import make_plan
from edgeprune.planning.modulation import GRID, Subspace, modulation_inputs, subspace
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import Precision, precision_of
from edgeprune.quantization.quantize import round_to_nearest
from edgeprune.sampling.denoising import encode_prompts, latent_shape, sigmas
from edgeprune.stages.prompts import CALIBRATION_PROMPTS, prompts_of
from edgeprune.stages.workspace import Workspace

Prompts = list[str]


def print_progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
    """Print about ten lines per stage."""
    if done % max(1, total // 10) == 0:
        print(f"  {what} {done}/{total} {note}", flush=True)


class Study:
    """A teacher, variants of it, and what was measured."""

    def __init__(self, out: Path, teacher: Teacher, *, per_task: int, steps: int) -> None:
        """Open the study in `out`, or begin it.

        Args:
            out: the folder.
            teacher: what is studied.
            per_task: held-out captions of each task whose images are scored.
            steps: training steps of a distilled variant.
        """
        self.out, self.model, self.world, self.per_task, self.steps = out, teacher.model, teacher.world, per_task, steps
        self.guided = teacher.guided
        self.path = out / "study.json"
        self.results: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        self.base = Workspace(out / "analysis", self.model)
        self.pipe, self.family, self.config = self.base.pipe, self.base.family, self.base.config
        self.teacher, self.generation = self.pipe.transformer, self.base.generation

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value of `key`; measure it now if it is not known."""
        if key not in self.results:
            print(f"{key} ...", flush=True)
            self.results[key] = measure()
            write_json(self.path, self.results)
        return self.results[key]

    @functools.cached_property
    def levels(self) -> torch.Tensor:
        """The sampler's noise levels without the last one, 0."""
        shape = latent_shape(self.pipe, self.generation)
        return sigmas(self.pipe, self.generation, shape)[:-1]

    def inputs(self, prompts: Prompts, levels: torch.Tensor | None = None) -> torch.Tensor:
        """Return modulation inputs (prompts, T, D); by default at the levels that `plan` calibrates on."""
        if levels is None:
            levels = torch.cat([self.levels, torch.linspace(0, 1, GRID)])
        pooled = encode_prompts(self.pipe, prompts, self.generation.max_sequence_length).pooled
        return modulation_inputs(self.family, self.teacher, levels * 1000, pooled, self.generation.guidance_scale)

    @property
    def tasks(self) -> int:
        """The number of tasks of captions."""
        return len(self.world.grammar.names)

    def captions(self, per_task: int | None = None) -> Prompts:
        """Return captions to calibrate on; by default about as many as `plan` takes."""
        count = self.tasks * (per_task or CALIBRATION_PROMPTS // self.tasks)
        return prompts_of(Split.CALIBRATION, count, self.world.grammar)

    @functools.cached_property
    def held_out(self) -> Prompts:
        """Three captions per task that neither the model nor any calibration has seen."""
        return [p.text for p in self.world.grammar.evaluation_prompts(3)]

    @functools.cached_property
    def usual(self) -> Subspace:
        """The subspace that `plan` would calibrate."""
        return subspace(self.inputs(["", *self.captions()]).flatten(0, 1))

    def thin(self, rank: int, basis: Subspace | None = None) -> Any:
        """Return the teacher with its modulation projected onto `rank` directions, in float32."""
        basis = basis or self.usual
        plan = make_plan(self.family, self.config, None, method="manual", modulation_rank=rank)
        return prune(self.family, self.teacher, self.config, plan, basis.mean, basis.basis(rank))

    @torch.no_grad()
    def rounded(self, model: Any, modulation: Precision | None = None) -> Any:
        """Round the weights of a model in place, as `quantize` does without data, and return it.

        Args:
            modulation: rounds only the modulation's layers, to this precision; by default every layer by the rule.
        """
        for name, layer in model.named_modules():
            weight = f"{name}.weight"
            if isinstance(layer, torch.nn.Linear) and (modulation is None or self.family.modulates(weight)):
                precision = modulation or precision_of(self.family, weight, tuple(layer.weight.shape))
                if precision.bits == 4:
                    layer.weight.copy_(round_int4(layer.weight, precision.group_size))
                else:
                    integers, scale = round_to_nearest(layer.weight, precision)
                    groups = integers.view(*scale.shape, -1) * scale.float()[..., None]
                    layer.weight.copy_(groups.view_as(layer.weight))
        return model

    @functools.cached_property
    def metric(self) -> VelocityError:
        """Error against the teacher on the teacher's states, held-out captions."""
        return VelocityError(self.pipe, self.generation, self.held_out, split=Split.HELD_OUT)

    def error(self, model: Any, metric: VelocityError | None = None) -> float:
        """Return the mean relative velocity error."""
        metric = metric or self.metric
        self.pipe.transformer = model
        try:
            return -float(np.mean(metric.score()))
        finally:
            self.pipe.transformer = self.teacher
