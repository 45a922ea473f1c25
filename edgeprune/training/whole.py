"""Distillation with both models in memory: the teacher's velocities and features are computed in every step.

tail.py trains on states from disk instead.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.data.pairs import Pairs
from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.training import lora
from edgeprune.training.distill import StepDone, train
from edgeprune.training.features import Catcher
from edgeprune.training.levels import draw_levels
from edgeprune.training.losses import distillation_loss
from edgeprune.training.parallel import Parallel
from edgeprune.training.prefix import SharedPrefix, common_blocks
from edgeprune.training.recipe import HERE, DistillOptions, Placement, Recipe, adapt, parameter_groups
from edgeprune.training.resume import step_generator
from edgeprune.training.rounding import Rounding
from edgeprune.training.teaching import checkpoint_activations

_PROCESSOR = torch.device("cpu")


@dataclass(frozen=True)
class Noisy:
    """A batch with noise added."""

    latents: torch.Tensor
    """(B, C, h, w), interpolated between data and noise."""
    condition: Conditioning
    sigma: torch.Tensor
    """(B)."""
    velocity: torch.Tensor
    """(B, C, h, w), noise minus clean latents."""

    def __getitem__(self, rows: slice) -> Noisy:
        """Return some samples of the batch."""
        return Noisy(
            latents=self.latents[rows],
            condition=self.condition[rows],
            sigma=self.sigma[rows],
            velocity=self.velocity[rows],
        )

    def __add__(self, other: Noisy) -> Noisy:
        """Return the samples of both batches."""
        return Noisy(
            latents=torch.cat([self.latents, other.latents]),
            condition=self.condition + other.condition,
            sigma=torch.cat([self.sigma, other.sigma]),
            velocity=torch.cat([self.velocity, other.velocity]),
        )

    def to(self, device: torch.device) -> Noisy:
        """Return the batch on a device."""
        return Noisy(
            latents=self.latents.to(device),
            condition=Conditioning(self.condition.hidden.to(device), self.condition.pooled.to(device)),
            sigma=self.sigma.to(device),
            velocity=self.velocity.to(device),
        )


def noisy(pairs: Pairs, options: DistillOptions, recipe: Recipe, schedule: NoiseSchedule, step: int) -> Noisy:
    """Draw the global batch of a step; the same in every process and after a resume."""
    generator = step_generator(options.seed, step)
    batch = pairs.batch(options.batch, recipe.drop_captions, generator)
    shape = tuple(batch.latents.shape[1:])
    sampled = schedule.sigmas(shape)[:-1]
    sigma = draw_levels(recipe.levels, options.batch, schedule.shift(shape), sampled, generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    mixed = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1))
    return Noisy(
        latents=mixed,
        condition=Conditioning(batch.hidden, batch.pooled),
        sigma=sigma,
        velocity=noise - batch.latents,
    )


def without_prompt(batch: Noisy, pairs: Pairs) -> Noisy:
    """Return a batch with the empty prompt instead of its captions."""
    return replace(batch, condition=Conditioning(*pairs.empty).to(batch.latents).like(batch.condition))


class Whole:
    """Teacher and student during training: the hooks on both, and the loss between them."""

    def __init__(
        self,
        family: Family,
        teacher: Any,
        student: Any,
        plan: PrunePlan,
        pairs: Pairs,
        options: DistillOptions,
        recipe: Recipe,
        schedule: NoiseSchedule,
        guidance: float,
    ) -> None:
        """Prepare the student for training. Call this before the weights are sharded."""
        self.family, self.teacher, self.student, self.plan, self.recipe = family, teacher, student, plan, recipe
        self.pairs, self.options, self.schedule, self.guidance = pairs, options, schedule, guidance
        self.module = student
        if options.gradient_checkpointing:
            checkpoint_activations(student)
        size = options.int4_group_size
        self.rounding = Rounding(family, student, size) if size is not None else None
        self.common = common_blocks(family, teacher, student, plan) if recipe.freeze_prefix else 0

    def place(self, parallel: Parallel) -> None:
        """Shard the teacher, or move it to the device."""
        parallel.teach(self.teacher)

    def begin(self, net: Any, parallel: Parallel) -> None:
        """Install the hooks and start computing with rounded weights.

        Args:
            net: the student as accelerate wraps it.
            parallel: where it computes.
        """
        family, recipe, plan = self.family, self.recipe, self.plan
        self.net, self.parallel = net, parallel
        self.teacher_features = Catcher(family, self.teacher, list(range(plan.num_blocks)), recipe.features)
        self.student_features = Catcher(family, self.student, plan.kept, recipe.features)
        self.prefix = SharedPrefix(family, self.teacher, self.student, self.common) if self.common else None
        self.student.train()
        if self.rounding:
            self.rounding.begin()

    def batch(self, step: int) -> Noisy:
        """Draw the global batch of a step."""
        return noisy(self.pairs, self.options, self.recipe, self.schedule, step)

    def loss(self, batch: Noisy) -> torch.Tensor:
        """Return the distillation loss of a batch."""
        with torch.no_grad(), self.parallel.autocast():
            target = self._target(batch)
        skip = self.prefix.student_begins_after() if self.prefix and not self.rounding else nullcontext()
        with self.parallel.autocast(), skip:
            predicted = velocity(self.net, batch.latents, batch.condition, batch.sigma, self.guidance)
        # The features of the frozen prefix cannot change; only later blocks can learn.
        learning = {
            block: streams
            for block, streams in self.student_features.features.items()
            if not self.recipe.freeze_prefix or block >= self.plan.first_pruned
        }
        taught = self.teacher_features.features
        return distillation_loss(predicted, target, batch.velocity, learning, taught, self.recipe.weights)[0]

    def _target(self, batch: Noisy) -> torch.Tensor:
        """Return the teacher's velocity, guided if the student learns that. Features are those with the prompt."""
        latents, scale = batch.latents.to(self.teacher.dtype), self.options.guidance

        def evaluated(condition: Conditioning) -> torch.Tensor:
            return velocity(self.teacher, latents, condition.to(latents), batch.sigma, self.guidance)

        empty = None if scale is None else evaluated(without_prompt(batch, self.pairs).condition)
        found = evaluated(batch.condition)
        return found if scale is None or empty is None else torch.lerp(empty, found, scale)

    def end(self) -> None:
        """Remove the hooks and restore both models."""
        self.parallel.release(self.teacher)
        self.teacher_features.close()
        self.student_features.close()
        if self.rounding:
            self.rounding.end()
        if self.prefix:
            self.prefix.end()


def distill(
    family: Family,
    teacher: Any,
    student: Any,
    plan: PrunePlan,
    report: ContributionReport | None,
    pairs: Pairs,
    options: DistillOptions,
    recipe: Recipe,
    schedule: NoiseSchedule,
    state_path: Path,
    *,
    inputs_digest: str,
    placement: Placement = HERE,
    device: torch.device = _PROCESSOR,
    guidance: float = 1.0,
    save_every: int = 100,
    progress: StepDone = lambda step, total, loss: None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train `student` in place; return its averaged state dict (in rank 0 only) and the loss of each step.

    Args:
        recipe: what those options became that follow from the plan and the model.
        schedule: the original's noise levels.
        state_path: the training state's file; a state of the same `inputs_digest` is resumed.
        placement: in how many micro-batches it trains, and what stays on the CPU.
        device: to train on, see `Parallel`.
        guidance: the guidance scale for models that take it as an input.
        save_every: save the state after this many steps.

    Raises:
        EdgepruneError: the loss or its gradient is not finite; the last good state stays on disk.
        Stopped: one of the processes received SIGTERM; the state is saved.
    """
    options.check()
    parallel = Parallel(options.mixed_precision or "no", options.batch, placement, device)
    adapt(family, student, plan, recipe, options)
    groups = parameter_groups(family, student, plan, report, recipe, options.rate)
    lesson = Whole(family, teacher, student, plan, pairs, options, recipe, schedule, guidance)
    state, losses = train(
        lesson, groups, options, state_path, parallel, inputs_digest=inputs_digest, save_every=save_every,
        progress=progress,
    )  # fmt: skip
    return lora.merged(state), losses
