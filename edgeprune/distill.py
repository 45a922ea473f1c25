"""One training loop that teaches the shorter model what the teacher knows, through accelerate.

PWP: everything before the first pruned block is frozen; since its inputs need no gradient either, autograd keeps
nothing of it. SGDistill: the more a part contributes, the less it is updated (`graded`: a learning rate of its own;
`binary`: the more contributing half is frozen). Quantisation-aware: the student computes with weights rounded to INT4,
and gradients pass straight through the rounding. Each step's randomness comes from (seed, step) and the state is
written atomically, so a killed run resumes to the same losses. What it leaves out: several processes, and data.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgeprune import stop
from edgeprune.contribution import ContributionReport
from edgeprune.data import Pairs
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.families import Family
from edgeprune.int4 import round_int4
from edgeprune.losses import Features, Weights, distillation_loss
from edgeprune.plan import PrunePlan
from edgeprune.precision import precision_of
from edgeprune.resume import Ema, load_state, save_state, step_generator
from edgeprune.sampling import Conditioning, velocity

SENSITIVITIES = ("graded", "binary", "off")
SCHEDULES = ("constant", "cosine")
FEATURES = ("blocks", "attention")
SAVE_S = 600.0
"""The state is saved at least as often as this, however long a step takes."""
_FLOOR = 0.1  # update strength of the most contributing part, graded


@dataclass(frozen=True)
class DistillOptions:
    """Everything that the result depends on, beside the models and the data."""

    steps: int = 1000
    batch: int = 32
    rate: float = 1e-4
    schedule: str = "constant"
    sensitivity: str = "graded"
    freeze_prefix: bool = True
    """PWP."""
    weights: Weights = Weights()
    features: str = "blocks"
    """Whose outputs `weights.feature` compares: those of blocks, or of their attention."""
    ema: float = 0.99
    drop_captions: float = 0.1
    """Share of samples trained with the empty prompt, for guidance."""
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    int4_group_size: int | None = 64
    """Train with weights rounded to INT4 in groups of this size; None trains without rounding."""
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range, naming the option."""
        for name, value, allowed in (
            ("--sensitivity", self.sensitivity, SENSITIVITIES),
            ("--features", self.features, FEATURES),
            ("--schedule", self.schedule, SCHEDULES),
            ("--mixed-precision", self.mixed_precision, ("no", "bf16", "fp16")),
        ):
            if value not in allowed:
                raise InputError(f"{name}: found {value!r}, expected one of {', '.join(allowed)}")
        if self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise InputError(
                f"--steps, --batch, --rate: found {self.steps}, {self.batch}, {self.rate}, expected above 0"
            )

    def to_json(self) -> dict[str, Any]:
        """For digests and reports."""
        return asdict(self)


def strengths(
    report: ContributionReport | None, plan: PrunePlan, mode: str, components: tuple[str, ...]
) -> dict[tuple[int, str], float]:
    """Update strength in 0..1 of every component of every kept block, by original index.

    Ranked over all kept parts, 1 for the least contributing; graded falls linearly to 0.1, binary is 1 or 0. Without
    scores of components a block's own score counts for them; without any scores everything is updated fully.
    """
    parts = [(b, c) for b in plan.kept for c in components if (b, c) not in plan.removed]
    if mode == "off" or report is None:
        return dict.fromkeys(parts, 1.0)
    known = report.contributions()
    drops = {}
    for part in parts:
        found = known.get(part) or known.get((part[0], None))
        if found is not None:
            drops[part] = found.drop
    order = sorted(drops, key=lambda p: (drops[p], p))
    out = dict.fromkeys(parts, 1.0)
    for rank, part in enumerate(order):
        share = rank / max(1, len(order) - 1)
        out[part] = 1 - share * (1 - _FLOOR) if mode == "graded" else float(share < 0.5)
    return out


def parameter_groups(
    family: Family, student: nn.Module, plan: PrunePlan, report: ContributionReport | None, options: DistillOptions
) -> list[dict[str, Any]]:
    """Optimizer groups by update strength; frozen parameters stop requiring gradients.

    Frozen by PWP: the blocks before the first pruned one, and the embedders that feed them.
    """
    strength = strengths(report, plan, options.sensitivity, family.components)
    config: Any = student.config
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        place = family.place(config, name)
        if place is None:
            after = name.startswith(family.tail)
            value = 1.0 if after or not options.freeze_prefix else 0.0
        else:
            original, component = plan.kept[place[0]], place[1]
            value = 1.0 if component is None else strength.get((original, component), 1.0)
            if options.freeze_prefix and original < plan.first_pruned:
                value = 0.0
        parameter.requires_grad_(value > 0)
        if value > 0:
            groups.setdefault(value, []).append(parameter)
    if not groups:
        raise InputError("nothing is left to train: every part is frozen; use --sensitivity off or --no-freeze-prefix")
    return [{"params": p, "lr": options.rate * s, "strength": s} for s, p in sorted(groups.items())]


class _Catcher:
    """Collects the outputs of blocks (or of their attention) by original index while a model runs."""

    def __init__(self, family: Family, model: nn.Module, originals: list[int], features: str) -> None:
        self.features: Features = {}
        self._hooks = []
        for block, original in zip(family.blocks(model), originals, strict=True):
            module = block if features == "blocks" else family.attention(block)
            if module is not None:
                hook = module.register_forward_hook(lambda _, __, out, key=original: self._catch(key, out))
                self._hooks.append(hook)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _catch(self, key: int, out: Any) -> None:
        context, image = (None, out) if isinstance(out, torch.Tensor) else out  # one stream, or context first
        self.features[key] = (image,) if context is None else (image, context)


def _round_weights(family: Family, student: nn.Module, group_size: int) -> list[nn.Linear]:
    """Let the linear layers that will be INT4 compute with rounded weights; the weights themselves stay as they are.

    By an own `forward`, not by a parametrisation: names stay those of the checkpoint. Returns the layers changed.
    """
    changed = []
    for name, layer in student.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        precision = precision_of(family, f"{name}.weight", tuple(layer.weight.shape), group_size=group_size)
        if precision.bits == 4:
            frozen = None if layer.weight.requires_grad else round_int4(layer.weight.detach(), precision.group_size)
            # mypy takes methods for constants.
            layer.forward = functools.partial(_rounded, layer, precision.group_size, frozen)  # type: ignore[method-assign]
            changed.append(layer)
    return changed


def _rounded(layer: nn.Linear, group_size: int, frozen: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, round_int4(layer.weight, group_size) if frozen is None else frozen, layer.bias)


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


def _noisy(pairs: Pairs, options: DistillOptions, step: int, device: torch.device) -> _Noisy:
    """The batch of a step, sigma logit-normal; the same after a resume."""
    g = step_generator(options.seed, step)
    batch = pairs.batch(options.batch, options.drop_captions, g)
    sigma = torch.sigmoid(torch.randn(options.batch, generator=g))
    noise = torch.randn(batch.latents.shape, generator=g)
    mixed = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1))
    condition = Conditioning(batch.hidden.to(device), batch.pooled.to(device))
    return _Noisy(mixed.to(device), condition, sigma.to(device), (noise - batch.latents).to(device))


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
    guidance: float = 1.0,
    save_every: int = 100,
    progress: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train `student` in place; returns the averaged state dict and the loss of every step.

    Args:
        guidance: the scale that models are trained at which take it as an input.

    Raises:
        EdgepruneError: the loss or its gradient is not finite; the last good state stays on disk.
    """
    from accelerate import Accelerator

    options.check()
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=not torch.cuda.is_available())
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(family, student, plan, report, options), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    rates = [g["lr"] for g in optimizer.param_groups]
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    net, optimizer = accelerator.prepare(student, optimizer)  # before the average is taken: it may move the weights
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    ema = Ema(trained, options.ema)
    step, losses = 0, []
    if state_path.exists():
        modules, meta = load_state(state_path, optimizer)
        if meta.get("inputs") == inputs_digest:
            student.load_state_dict(student.state_dict() | modules["student"])
            ema.load(modules["ema"])
            step, losses = meta["step"], meta["losses"]
        else:
            optimizer.state.clear()
    saved, saved_s = step, time.monotonic()

    def check_finite(what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            kept = f"{state_path} holds the state after step {saved}" if saved else "no step was saved yet"
            raise EdgepruneError(f"distill: {what} is not finite at step {step + 1}; {kept}; lower --rate")

    catch_teacher = _Catcher(family, teacher, list(range(plan.num_blocks)), options.features)
    catch_student = _Catcher(family, student, plan.kept, options.features)
    rounded = _round_weights(family, student, options.int4_group_size) if options.int4_group_size else []
    student.train()
    teacher.eval().requires_grad_(False)
    teacher.to(accelerator.device)
    while step < options.steps:
        noisy = _noisy(pairs, options, step, accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            target = velocity(teacher, noisy.latents, noisy.condition, noisy.sigma, guidance)
        with accelerator.autocast():
            found = velocity(net, noisy.latents, noisy.condition, noisy.sigma, guidance)
        # Features of the frozen prefix are what they are; only later blocks can learn.
        later = {k: v for k, v in catch_student.features.items() if not options.freeze_prefix or k >= plan.first_pruned}
        loss, _ = distillation_loss(found, target, noisy.velocity, later, catch_teacher.features, options.weights)
        check_finite("the loss", loss)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _factor(options.schedule, step, options.steps)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(list(trained.values()), 1.0)
        if options.mixed_precision != "fp16":  # whose scaler leaves out such a step
            check_finite("the gradient", norm)  # or the weights are lost, and saved so
        optimizer.step()
        ema.update(step)
        losses.append(loss.item())
        step += 1
        late = time.monotonic() - saved_s > SAVE_S or stop.asked()
        if step % save_every == 0 or step == options.steps or late:
            state = {n: p.detach() for n, p in trained.items()}
            meta = {"step": step, "losses": losses, "inputs": inputs_digest}
            save_state(state_path, {"student": state, "ema": ema.average}, optimizer, meta)
            saved, saved_s = step, time.monotonic()
        progress(step, options.steps, losses[-1])
    teacher.to("cpu")
    catch_teacher.close()
    catch_student.close()
    for layer in rounded:
        del layer.forward
    result = {n: t.detach().cpu() for n, t in student.state_dict().items()} | {
        n: t.cpu() for n, t in ema.average.items()
    }
    return result, losses
