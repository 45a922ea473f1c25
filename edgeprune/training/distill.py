"""One training loop that teaches the shorter model what the teacher knows, through accelerate.

Quantisation-aware: the student computes with weights rounded to INT4. Of a frozen part whose inputs need no gradient,
autograd keeps nothing. Each step's randomness comes from (seed, step) and the state is written atomically, so a killed
run resumes to the same losses, also with another number of processes. What it leaves out: what is frozen (recipe.py),
processes (engine.py), and data.

    python -m edgeprune.distill -o small  # as `edgeprune distill`: for launchers that take a module
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
from edgeprune.training.features import Catcher
from edgeprune.training.losses import distillation_loss
from edgeprune.training.parallel import Engine
from edgeprune.training.prefix import SharedPrefix, common_blocks
from edgeprune.training.recipe import HERE, DistillOptions, Placement, parameter_groups
from edgeprune.training.resume import Ema, fill, fill_optimizer, read_state, save_state, step_generator, whole
from edgeprune.training.rounding import Rounding
from edgeprune.training.teaching import checkpoint_activations
from edgeprune.training.zero import held

SAVE_S = 600.0
"""The state is saved at least as often as this, however long a step takes."""


def _factor(schedule: str, step: int, total: int) -> float:
    warm = min(1.0, (step + 1) / 20)
    if schedule == "constant":
        return warm
    return warm * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / total))))


@dataclass(frozen=True)
class _Noisy:
    """One step's batch on its way between data and noise."""

    latents: torch.Tensor
    """(B, C, h, w), between data and noise."""
    condition: Conditioning
    sigma: torch.Tensor
    """(B)."""
    velocity: torch.Tensor
    """Noise minus clean latents."""

    def __getitem__(self, rows: slice) -> _Noisy:
        """Some of its samples."""
        return _Noisy(self.latents[rows], self.condition[rows], self.sigma[rows], self.velocity[rows])

    def to(self, device: torch.device) -> _Noisy:
        """On a device."""
        condition = Conditioning(self.condition.hidden.to(device), self.condition.pooled.to(device))
        return _Noisy(self.latents.to(device), condition, self.sigma.to(device), self.velocity.to(device))


def _noisy(pairs: Pairs, options: DistillOptions, step: int) -> _Noisy:
    """The global batch of a step, sigma logit-normal; the same in every process and after a resume."""
    g = step_generator(options.seed, step)
    batch = pairs.batch(options.batch, options.drop_captions, g)
    sigma = torch.sigmoid(torch.randn(options.batch, generator=g))
    noise = torch.randn(batch.latents.shape, generator=g)
    mixed = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1))
    return _Noisy(mixed, Conditioning(batch.hidden, batch.pooled), sigma, noise - batch.latents)


def distill(
    family: Family,
    teacher: Any,
    student: Any,
    plan: PrunePlan,
    report: ContributionReport | None,
    pairs: Pairs,
    options: DistillOptions,
    state_path: Path,
    *,
    inputs_digest: str,
    placement: Placement = HERE,
    guidance: float = 1.0,
    save_every: int = 100,
    progress: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train `student` in place; returns the averaged state dict (of the first process alone) and each step's loss.

    Args:
        placement: where it is computed, and in which portions.
        guidance: the scale that models are trained at which take it as an input.

    Raises:
        EdgepruneError: the loss or its gradient is not finite; the last good state stays on disk.
        Stopped: SIGTERM came to one of the processes; the state is saved.
    """
    options.check()
    engine = Engine(options.mixed_precision, options.batch, placement)
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(family, student, plan, report, options), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    rates = [g["lr"] for g in optimizer.param_groups]
    if options.gradient_checkpointing:
        checkpoint_activations(student)
    rounding = Rounding(family, student, options.int4_group_size) if options.int4_group_size is not None else None
    common = common_blocks(family, teacher, student, plan) if options.freeze_prefix else 0
    step, losses, left = 0, [], None
    if state_path.exists():
        modules, slots, meta = read_state(state_path)
        if meta.get("inputs") == inputs_digest:
            left = modules["ema"], slots
            step, losses = meta["step"], meta["losses"]
            # Before the engine has them: DeepSpeed takes copies of its own.
            fill({n: p for n, p in student.named_parameters() if p.requires_grad}, modules["student"])
    net, optimizer = engine.train(student, optimizer)  # before the average is taken: it may move the weights
    engine.teach(teacher)
    trained = {n: held(p) for n, p in student.named_parameters() if p.requires_grad}
    ema = Ema(trained, options.ema)
    if left:
        fill(ema.average, left[0])
        fill_optimizer(state_path, optimizer, left[1])
    saved, saved_s = step, time.monotonic()

    def check_finite(what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"{state_path} holds the state after step {saved}" if saved else "no step was saved yet"
            raise EdgepruneError(f"distill: {what} is not finite at step {step + 1}; {kept}; lower --rate")

    def loss_of(part: _Noisy) -> torch.Tensor:
        with torch.no_grad(), engine.autocast():
            seen = part.latents.to(teacher.dtype)
            target = velocity(teacher, seen, part.condition.to(seen), part.sigma, guidance)
        begins = prefix.student_begins_after() if prefix and not rounding else nullcontext()
        with engine.autocast(), begins:
            found = velocity(net, part.latents, part.condition, part.sigma, guidance)
        # Features of the frozen prefix are what they are; only later blocks can learn.
        later = {k: v for k, v in catch_student.features.items() if not options.freeze_prefix or k >= plan.first_pruned}
        return distillation_loss(found, target, part.velocity, later, catch_teacher.features, options.weights)[0]

    catch_teacher = Catcher(family, teacher, list(range(plan.num_blocks)), options.features)
    catch_student = Catcher(family, student, plan.kept, options.features)
    prefix = SharedPrefix(family, teacher, student, common) if common else None
    student.train()
    if rounding:
        rounding.begin()
    with stop.held():  # processes stop at a step that they agree on
        while step < options.steps:
            noisy = _noisy(pairs, options, step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _factor(options.schedule, step, options.steps)
            optimizer.zero_grad(set_to_none=True)
            own = 0.0
            for rows in engine.rows:
                with engine.portion(net):
                    loss = loss_of(noisy[rows].to(engine.device))
                    engine.accelerator.backward(loss)
                own += loss.item() / len(engine.rows)
            late = time.monotonic() - saved_s > SAVE_S
            mean, due, asked = engine.mean(own, late, stop.asked())
            check_finite("the loss", mean)
            norm = engine.clip(list(trained.values()))
            if options.mixed_precision != "fp16":  # whose scaler leaves out such a step
                check_finite("the gradient", norm.item())  # or the weights are lost, and saved so
            optimizer.step()
            ema.update(step)
            losses.append(mean)
            step += 1
            if step % save_every == 0 or step == options.steps or due or asked:
                state = {n: p.detach() for n, p in trained.items()}
                meta = {"step": step, "losses": losses, "inputs": inputs_digest}
                save_state(state_path, {"student": state, "ema": ema.average}, optimizer, meta)
                saved, saved_s = step, time.monotonic()
            progress(step, options.steps, mean)
            if asked:
                raise stop.Stopped
    engine.release(teacher)
    catch_teacher.close()
    catch_student.close()
    if rounding:
        rounding.end()
    if prefix:
        prefix.end()
    result = {}
    weights = {name: held(tensor) for name, tensor in student.state_dict(keep_vars=True).items()}
    for name, tensor in (weights | ema.average).items():
        full = whole(tensor.detach()).cpu()  # all processes have to give their part
        if processes.is_main():
            result[name] = full
    return result, losses
