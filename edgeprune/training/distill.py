"""The training loop: a pruned student learns to reproduce its teacher's velocities and features, through accelerate.

Training is quantisation-aware: the student computes with weights rounded to INT4. Autograd stores no activations for a
frozen part whose inputs need no gradient. Each step derives its randomness from (seed, step), and the state is written
atomically, so an interrupted run resumes to the same losses, even with another number of processes.

    python -m edgeprune.distill -o small  # the same as `edgeprune distill`, for launchers that take a module
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common import processes, stop
from edgeprune.common.errors import EdgepruneError
from edgeprune.data.pairs import Pairs
from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.training.features import Catcher
from edgeprune.training.levels import draw_levels
from edgeprune.training.losses import distillation_loss
from edgeprune.training.parallel import Parallel
from edgeprune.training.prefix import SharedPrefix, common_blocks
from edgeprune.training.recipe import HERE, DistillOptions, Placement, Recipe, parameter_groups
from edgeprune.training.resume import Ema, fill, fill_optimizer, gathered, read_state, save_state, step_generator
from edgeprune.training.rounding import Rounding
from edgeprune.training.teaching import checkpoint_activations
from edgeprune.training.zero import shard_of

SAVE_S = 600.0
"""The state is saved at least this often, however long a step takes."""

StepDone = Callable[[int, int, float], None]
"""Called after each step with the steps done, their total, and the step's loss."""


def _factor(schedule: str, step: int, total: int) -> float:
    """Return the factor on the learning rate at a step: 20 steps of warm-up, then the schedule."""
    warmup = min(1.0, (step + 1) / 20)
    if schedule == "constant":
        return warmup
    return warmup * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / total))))


@dataclass(frozen=True)
class _Noisy:
    """A batch with noise added."""

    latents: torch.Tensor
    """(B, C, h, w), interpolated between data and noise."""
    condition: Conditioning
    sigma: torch.Tensor
    """(B)."""
    velocity: torch.Tensor
    """(B, C, h, w), noise minus clean latents."""

    def __getitem__(self, rows: slice) -> _Noisy:
        """Return some samples of the batch."""
        return _Noisy(
            latents=self.latents[rows],
            condition=self.condition[rows],
            sigma=self.sigma[rows],
            velocity=self.velocity[rows],
        )

    def to(self, device: torch.device) -> _Noisy:
        """Return the batch on a device."""
        return _Noisy(
            latents=self.latents.to(device),
            condition=Conditioning(self.condition.hidden.to(device), self.condition.pooled.to(device)),
            sigma=self.sigma.to(device),
            velocity=self.velocity.to(device),
        )


def _noisy(pairs: Pairs, options: DistillOptions, recipe: Recipe, schedule: NoiseSchedule, step: int) -> _Noisy:
    """Draw the global batch of a step; the same in every process and after a resume."""
    generator = step_generator(options.seed, step)
    batch = pairs.batch(options.batch, recipe.drop_captions, generator)
    shape = tuple(batch.latents.shape[1:])
    sampled = schedule.sigmas(shape)[:-1]
    sigma = draw_levels(recipe.levels, options.batch, schedule.shift(shape), sampled, generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    mixed = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1))
    return _Noisy(
        latents=mixed,
        condition=Conditioning(batch.hidden, batch.pooled),
        sigma=sigma,
        velocity=noise - batch.latents,
    )


class _Models:
    """Teacher and student during training: the hooks on both, and the loss between them."""

    def __init__(
        self,
        family: Family,
        teacher: Any,
        student: Any,
        plan: PrunePlan,
        options: DistillOptions,
        recipe: Recipe,
        schedule: NoiseSchedule,
        guidance: float,
        parallel: Parallel,
    ) -> None:
        """Prepare the student for training. Call this before the weights are sharded."""
        self.family, self.teacher, self.student, self.plan, self.recipe = family, teacher, student, plan, recipe
        self.schedule, self.guidance, self.parallel = schedule, guidance, parallel
        if options.gradient_checkpointing:
            checkpoint_activations(student)
        size = options.int4_group_size
        self.rounding = Rounding(family, student, size) if size is not None else None
        self.common = common_blocks(family, teacher, student, plan) if recipe.freeze_prefix else 0

    def begin(self, net: Any) -> None:
        """Install the hooks and start computing with rounded weights.

        Args:
            net: the student as accelerate wraps it.
        """
        family, recipe, plan = self.family, self.recipe, self.plan
        self.net = net
        self.teacher_features = Catcher(family, self.teacher, list(range(plan.num_blocks)), recipe.features)
        self.student_features = Catcher(family, self.student, plan.kept, recipe.features)
        self.prefix = SharedPrefix(family, self.teacher, self.student, self.common) if self.common else None
        self.student.train()
        if self.rounding:
            self.rounding.begin()

    def loss(self, batch: _Noisy) -> torch.Tensor:
        """Return the distillation loss of a batch."""
        with torch.no_grad(), self.parallel.autocast():
            latents = batch.latents.to(self.teacher.dtype)
            target = velocity(self.teacher, latents, batch.condition.to(latents), batch.sigma, self.guidance)
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

    def end(self) -> None:
        """Remove the hooks and restore both models."""
        self.parallel.release(self.teacher)
        self.teacher_features.close()
        self.student_features.close()
        if self.rounding:
            self.rounding.end()
        if self.prefix:
            self.prefix.end()


class _State:
    """What changes while training: trained weights, their average, the optimizer, the losses. Saved and resumed."""

    def __init__(self, path: Path, inputs_digest: str, optimizer: Any, options: DistillOptions) -> None:
        self.path, self.inputs_digest, self.optimizer, self.options = path, inputs_digest, optimizer, options
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.saved_step, self.saved_s = 0, 0, 0.0
        self.losses: list[float] = []

    def prepare(self, models: _Models) -> None:
        """Load the saved state of the same inputs, if there is one, and give models and optimizer to accelerate."""
        student, parallel, resumed = models.student, models.parallel, None
        if self.path.exists():
            modules, slots, meta = read_state(self.path)
            if meta.get("inputs") == self.inputs_digest:
                resumed = modules["ema"], slots
                self.step, self.losses = meta["step"], meta["losses"]
                # Before accelerate prepares the student: DeepSpeed copies the weights.
                fill({n: p for n, p in student.named_parameters() if p.requires_grad}, modules["student"])
        self.net, self.optimizer = parallel.train(student, self.optimizer)  # may move the weights, so before the Ema
        parallel.teach(models.teacher)
        self.trained = {n: shard_of(p) for n, p in student.named_parameters() if p.requires_grad}
        self.ema = Ema(self.trained, self.options.ema)
        if resumed:
            fill(self.ema.average, resumed[0])
            fill_optimizer(self.path, self.optimizer, resumed[1])
        self.saved_step, self.saved_s = self.step, time.monotonic()

    def set_rates(self) -> None:
        """Set the learning rates of this step and clear the gradients."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _factor(self.options.schedule, self.step, self.options.steps)
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, parallel: Parallel, loss: float) -> None:
        """Take an optimizer step with the accumulated gradients, unless loss or gradient is not finite."""
        self._check_finite("the loss", loss)
        norm = parallel.clip(list(self.trained.values()))
        if self.options.mixed_precision != "fp16":  # the fp16 scaler skips such a step itself
            self._check_finite("the gradient", norm.item())  # otherwise the weights would be lost, and saved as such
        self.optimizer.step()
        self.ema.update(self.step)
        self.losses.append(loss)
        self.step += 1

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"{self.path} holds the state after step {self.saved_step}"
            kept = kept if self.saved_step else "no step was saved yet"
            raise EdgepruneError(f"distill: {what} is not finite at step {self.step + 1}; {kept}; lower --rate")

    def save(self) -> None:
        """Write the state. Collective: every rank must call it."""
        student = {n: p.detach() for n, p in self.trained.items()}
        meta = {"step": self.step, "losses": self.losses, "inputs": self.inputs_digest}
        save_state(self.path, {"student": student, "ema": self.ema.average}, self.optimizer, meta)
        self.saved_step, self.saved_s = self.step, time.monotonic()

    def averaged(self, student: Any) -> dict[str, torch.Tensor]:
        """Return the student's state dict with averaged weights; empty except in rank 0. Collective."""
        result = {}
        weights = {name: shard_of(tensor) for name, tensor in student.state_dict(keep_vars=True).items()}
        for name, tensor in (weights | self.ema.average).items():
            full = gathered(tensor.detach()).cpu()  # in every rank: each holds a part
            if processes.is_main():
                result[name] = full
        return result


def _train(models: _Models, state: _State, pairs: Pairs, save_every: int, progress: StepDone) -> None:
    """Run the remaining steps, saving the state on the way."""
    options, parallel = state.options, models.parallel
    with stop.deferred():  # all ranks stop after the same step, see `asked`
        while state.step < options.steps:
            noisy = _noisy(pairs, options, models.recipe, models.schedule, state.step)
            state.set_rates()
            loss_here = 0.0
            for rows in parallel.rows:
                with parallel.micro_batch(state.net):
                    loss = models.loss(noisy[rows].to(parallel.device))
                    parallel.accelerator.backward(loss)
                loss_here += loss.item() / len(parallel.rows)
            late = time.monotonic() - state.saved_s > SAVE_S
            mean, due, asked = parallel.mean(loss_here, late, stop.asked())
            state.update(parallel, mean)
            if state.step % save_every == 0 or state.step == options.steps or due or asked:
                state.save()
            progress(state.step, options.steps, mean)
            if asked:
                raise stop.Stopped


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
    guidance: float = 1.0,
    save_every: int = 100,
    progress: StepDone = lambda step, total, loss: None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train `student` in place; return its averaged state dict (in rank 0 only) and the loss of each step.

    Args:
        recipe: what those options became that follow from the plan and the model.
        schedule: the original's noise levels.
        state_path: the training state's file; a state of the same `inputs_digest` is resumed.
        placement: where training runs, and in how many micro-batches.
        guidance: the guidance scale for models that take it as an input.
        save_every: save the state after this many steps.

    Raises:
        EdgepruneError: the loss or its gradient is not finite; the last good state stays on disk.
        Stopped: one of the processes received SIGTERM; the state is saved.
    """
    options.check()
    parallel = Parallel(options.mixed_precision, options.batch, placement)
    groups = parameter_groups(family, student, plan, report, recipe, options.rate)
    optimizer: Any = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0)
    state = _State(state_path, inputs_digest, optimizer, options)
    models = _Models(family, teacher, student, plan, options, recipe, schedule, guidance, parallel)
    state.prepare(models)
    models.begin(state.net)
    _train(models, state, pairs, save_every, progress)
    models.end()
    return state.averaged(student), state.losses
