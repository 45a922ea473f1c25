"""The training loop: a pruned student learns from a lesson, such as its teacher's velocities, through accelerate.

Training is quantisation-aware: the student computes with weights rounded to INT4. Autograd stores no activations for a
frozen part whose inputs need no gradient. Each step derives its randomness from (seed, step), and the state is written
atomically, so an interrupted run resumes to the same losses, even with another number of processes.

    python -m edgeprune.distill -o small  # the same as `edgeprune distill`, for launchers that take a module
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeprune.common import processes, stop
from edgeprune.common.errors import EdgepruneError
from edgeprune.training import eight_bit
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import EIGHT_BIT, DistillOptions
from edgeprune.training.resume import Ema, fill, fill_optimizer, gathered, read_state, save_state
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


class Batch(Protocol):
    """The samples of a step."""

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of them."""

    def to(self, device: torch.device) -> Batch:
        """Return them on a device."""


class Lesson(Protocol):
    """What a student learns from, and the loss by which it learns."""

    student: Any
    """Its parameters that need gradients are trained; the result has the names of its tensors."""
    module: Any
    """What is called with a batch: the student, or a module around it."""

    def place(self, parallel: Parallel) -> None:
        """Put what teaches where it computes, after the student is there."""

    def begin(self, net: Any, parallel: Parallel) -> None:
        """Install hooks and start computing with rounded weights; `net` is the module as accelerate wraps it."""

    def batch(self, step: int) -> Any:
        """Draw the global batch of a step: a `Batch`, the same in every process and after a resume."""

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the loss of some samples."""

    def end(self) -> None:
        """Remove the hooks and restore the models."""


class _State:
    """What changes while training: trained weights, their average, the optimizer, the losses. Saved and resumed."""

    def __init__(self, path: Path, inputs_digest: str, optimizer: Any, options: DistillOptions) -> None:
        self.path, self.inputs_digest, self.optimizer, self.options = path, inputs_digest, optimizer, options
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.saved_step, self.saved_s = 0, 0, 0.0
        self.losses: list[float] = []

    def prepare(self, lesson: Lesson, parallel: Parallel) -> None:
        """Load the saved state of the same inputs, if there is one, and give models and optimizer to accelerate."""
        student, resumed = lesson.student, None
        if self.path.exists():
            modules, slots, meta = read_state(self.path)
            if meta.get("inputs") == self.inputs_digest:
                resumed = modules.get("ema", modules["student"]), slots
                self.step, self.losses = meta["step"], meta["losses"]
                # Before accelerate prepares the student: DeepSpeed copies the weights.
                fill({n: p for n, p in student.named_parameters() if p.requires_grad}, modules["student"])
        # This may move the weights, so it is done before the Ema.
        self.net, self.optimizer = parallel.train(lesson.module, self.optimizer)
        lesson.place(parallel)
        self.trained = {n: shard_of(p) for n, p in student.named_parameters() if p.requires_grad}
        self.ema = Ema(self.trained, self.options.ema, host=parallel.ema_offload)
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
        meta = {
            "step": self.step, "losses": self.losses, "inputs": self.inputs_digest,
            "mixed_precision": self.options.mixed_precision,
        }  # fmt: skip
        averages = {"ema": self.ema.average} if self.options.ema else {}
        save_state(self.path, {"student": student} | averages, self.optimizer, meta)
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


def _train(lesson: Lesson, state: _State, parallel: Parallel, until: int, save_every: int, progress: StepDone) -> None:
    """Run the remaining steps, saving the state on the way."""
    options = state.options
    with stop.deferred():  # all ranks stop after the same step, see `asked`
        while state.step < until:
            batch = lesson.batch(state.step)
            state.set_rates()
            loss_here = 0.0
            for rows in parallel.rows:
                with parallel.micro_batch(state.net):
                    loss = lesson.loss(batch[rows].to(parallel.device))
                    parallel.accelerator.backward(loss)
                loss_here += loss.item() / len(parallel.rows)
            late = time.monotonic() - state.saved_s > SAVE_S
            mean, due, asked = parallel.mean(loss_here, late, stop.asked())
            state.update(parallel, mean)
            if state.step % save_every == 0 or state.step == until or due or asked:
                state.save()
            progress(state.step, options.steps, mean)
            if asked:
                raise stop.Stopped


def train(
    lesson: Lesson,
    groups: list[dict[str, Any]],
    options: DistillOptions,
    state_path: Path,
    parallel: Parallel,
    *,
    inputs_digest: str,
    until: int | None = None,
    save_every: int = 100,
    progress: StepDone = lambda step, total, loss: None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train a student in place; return the loss of each step, and at the end its averaged state dict (in rank 0 only).

    Args:
        lesson: the student, and what it learns from.
        groups: what is trained at which rate, see `parameter_groups`.
        options: of the training.
        state_path: the training state's file; a state of the same `inputs_digest` is resumed.
        parallel: where training runs; it holds no model afterwards.
        inputs_digest: of everything that the result depends on.
        until: stop after this step, to be resumed by another call; None runs all.
        save_every: save the state after this many steps.
        progress: see `StepDone`.

    Raises:
        EdgepruneError: the loss or its gradient is not finite; the last good state stays on disk.
        Stopped: one of the processes received SIGTERM; the state is saved.
    """
    # Of torch's forms, fused passes over memory once: its step takes a third of the time on a CPU.
    make = eight_bit.adamw if options.optimizer == EIGHT_BIT else partial(torch.optim.AdamW, fused=True)
    optimizer: Any = make(groups, lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0)
    state = _State(state_path, inputs_digest, optimizer, options)
    state.prepare(lesson, parallel)
    lesson.begin(state.net, parallel)
    _train(lesson, state, parallel, options.steps if until is None else until, save_every, progress)
    lesson.end()
    try:
        return state.averaged(lesson.student) if state.step == options.steps else {}, state.losses
    finally:
        parallel.free()
