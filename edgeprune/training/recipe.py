"""The options of distillation: what is trained for how long, what is frozen, and how strongly the rest is updated.

PWP freezes everything before the first pruned block. SGDistill (`graded`) updates a component the less, the more it
contributes: each component has its own learning rate. Options that are None follow from the plan and the model; a
`Recipe` holds what they became.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import nn

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import InputError
from edgeprune.common.extras import require
from edgeprune.families import Config, Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.quantize import CALIBRATIONS
from edgeprune.training import lora
from edgeprune.training.levels import LEVELS
from edgeprune.training.losses import LossWeights
from edgeprune.training.trained import ALL, rank_of

SENSITIVITIES = ("graded", "off")
BINARY = "the reference's binary form is the frozen prefix (PWP), with all parts after it trained alike; use off"
"""Why `binary` is not a sensitivity."""
SCHEDULES = ("constant", "cosine")
ADAMW, EIGHT_BIT = OPTIMIZERS = ("adamw", "adamw8bit")
TEACHERS = ("float32", "bf16", "int8")
FEATURES = ("blocks", "attention")
_FLOOR = 0.1
"""The update strength of the component that contributes most, with `graded`."""


@dataclass(frozen=True)
class Recipe:
    """How a plan is distilled: the values of those options that follow from the plan and the model, if not set.

    The defaults are HierarchicalPrune's for a plan that removes whole blocks, for a model that is not guided.
    """

    sensitivity: str = "off"
    """`graded`: the more a component contributes, the lower its learning rate. `off`: all parts are trained alike."""
    freeze_prefix: bool = True
    """Freeze everything before the first pruned block (PWP)."""
    features: str = "blocks"
    """The outputs that the feature loss compares: those of `blocks`, or of their `attention`."""
    lambda_task: float = 0.0
    lambda_output: float = 1.0
    lambda_feature: float = 1e-4
    drop_captions: float = 0.0
    """The fraction of samples trained with the empty prompt, which guidance evaluates too."""
    levels: str = "shifted"
    """How noise levels are drawn, see levels.py."""
    states: int = 0
    """Train the tail alone, from so many cached states a round (tail.py); 0 runs both models in every step."""
    rounds: int = 1
    """How often the states are made."""
    prefix_calibration: str = "none"
    """How the integers of the frozen prefix are chosen, before states are made through it."""

    @property
    def weights(self) -> LossWeights:
        """The weights of the terms of the loss."""
        return LossWeights(task=self.lambda_task, output=self.lambda_output, feature=self.lambda_feature)


@dataclass(frozen=True)
class DistillOptions:
    """Everything that the result depends on, apart from the models and the data.

    Fields that are None by default are those of `Recipe`.
    """

    steps: int = 1000
    batch: int = 32
    rate: float = 1e-4
    schedule: str = "constant"
    optimizer: str = ADAMW
    """AdamW with moments in float32, or of a byte each, see eight_bit.py."""
    sensitivity: str | None = None
    freeze_prefix: bool | None = None
    features: str | None = None
    lambda_task: float | None = None
    lambda_output: float | None = None
    lambda_feature: float | None = None
    drop_captions: float | None = None
    levels: str | None = None
    ema: float = 0.99
    """The decay of the moving average of the weights."""
    mixed_precision: str | None = None
    """Number format of the student's computation; None follows from the model and the device, and is `no` here."""
    gradient_checkpointing: bool = False
    int4_group_size: int | None = 64
    """Train with weights rounded to INT4 in groups of this size; None trains without rounding."""
    teacher_precision: str = "float32"
    """The precision of the teacher's weights."""
    seed: int = 0
    train: str = ALL
    """What is trained: all weights after the prefix, or `lora:R`, low-rank additions to them, see lora.py."""
    states: int | None = None
    rounds: int | None = None
    prefix_calibration: str | None = None
    guidance: float | None = None
    """Learn the teacher's velocity guided at this scale, so that a step is one evaluation; None learns the conditional
    one."""

    def check(self) -> None:
        """Check the options.

        Raises:
            InputError: a value is not allowed; the message names the option.
            MissingExtraError: an option needs a package that is not installed.
        """
        if self.sensitivity == "binary":
            raise InputError(f"--sensitivity: found 'binary': {BINARY}")
        if rank_of(self.train) is not None:
            require(("peft",), "train")
        if self.optimizer == EIGHT_BIT:
            require(("bitsandbytes",), "adamw8bit")
        for name, value, allowed in (
            ("--sensitivity", self.sensitivity, (None, *SENSITIVITIES)),
            ("--features", self.features, (None, *FEATURES)),
            ("--levels", self.levels, (None, *LEVELS)),
            ("--schedule", self.schedule, SCHEDULES),
            ("--optimizer", self.optimizer, OPTIMIZERS),
            ("--teacher-precision", self.teacher_precision, TEACHERS),
            ("--mixed-precision", self.mixed_precision, (None, "no", "bf16", "fp16")),
            ("--prefix-calibration", self.prefix_calibration, (None, *CALIBRATIONS)),
        ):
            if value not in allowed:
                raise InputError(f"{name}: found {value!r}, expected one of {', '.join(filter(None, allowed))}")
        if not 0 <= (self.drop_captions or 0) <= 1:
            raise InputError(f"--drop-captions: found {self.drop_captions}, expected a share from 0 to 1")
        if (self.states or 0) < 0 or not (self.rounds is None or 1 <= self.rounds <= self.steps):
            raise InputError(
                f"--states, --rounds: found {self.states}, {self.rounds}, expected 0 or more, and from 1 to as many "
                f"rounds as the {self.steps} steps"
            )
        numbers = ("rate", "ema", "lambda_task", "lambda_output", "lambda_feature")
        for option, value in ((f"--{n.replace('_', '-')}", getattr(self, n)) for n in numbers):
            if value is not None and not math.isfinite(value):
                raise InputError(f"{option}: found {value}, expected a finite number")
        if self.guidance is not None and not 1 < self.guidance < math.inf:
            raise InputError(f"--distill-guidance: found {self.guidance:g}, expected above 1, where guidance begins")
        if self.guidance is not None and (self.lambda_task or self.drop_captions):
            other = "--lambda-task" if self.lambda_task else "--drop-captions"
            raise InputError(f"{other}: teaches the velocity without guidance; omit it, or --distill-guidance")
        if self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise InputError(
                f"--steps, --batch, --rate: found {self.steps}, {self.batch}, {self.rate}, expected above 0"
            )

    def over(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the options that are set on top."""
        chosen = {name: getattr(self, name) for name in asdict(recipe)}
        return replace(recipe, **{name: value for name, value in chosen.items() if value is not None})

    def to_json(self, recipe: Recipe) -> dict[str, Any]:
        """Return the options for digests and reports, with what those that are None became."""
        data = asdict(self) | asdict(recipe)
        if not recipe.states:  # folders that were trained before there were states stay current
            del data["states"], data["rounds"], data["prefix_calibration"]
        if self.train == ALL:
            del data["train"]
        if self.optimizer == ADAMW:
            del data["optimizer"]
        if self.guidance is None:
            del data["guidance"]
        return data


def strengths(
    report: ContributionReport | None,
    plan: PrunePlan,
    components: tuple[str, ...],
    *,
    sensitivity: str,
    freeze_prefix: bool,
) -> dict[tuple[int, str], float]:
    """Return the update strength in 0..1 of every component of every kept block, by original index.

    A component before the first pruned block has strength 0 with `freeze_prefix`. `graded` ranks the others by
    contribution: strength falls linearly from 1 for the lowest to 0.1 for the highest. A component without a score
    takes its block's score; one without any score has strength 1, and so has every one with `off`.
    """
    kept = [(b, c) for b in plan.kept for c in components if (b, c) not in plan.removed]
    frozen = [part for part in kept if freeze_prefix and part[0] < plan.first_pruned]
    out = dict.fromkeys(kept, 1.0) | dict.fromkeys(frozen, 0.0)
    if sensitivity == "off" or report is None:
        return out
    contributions = report.contributions()
    drops = {}
    for component in kept[len(frozen) :]:
        contribution = contributions.get(component) or contributions.get((component[0], None))
        if contribution is not None:
            drops[component] = contribution.drop
    order = sorted(drops, key=lambda c: (drops[c], c))
    for rank, component in enumerate(order):
        out[component] = 1 - rank / max(1, len(order) - 1) * (1 - _FLOOR)
    return out


def in_prefix(family: Family, config: Config, plan: PrunePlan, name: str) -> bool:
    """Return whether a tensor of the pruned model comes before the first pruned block; PWP freezes these.

    Args:
        family: the model's.
        config: of the pruned model.
        plan: what was pruned.
        name: of the tensor.
    """
    place = family.place(config, name)
    return not name.startswith(family.tail) if place is None else plan.kept[place[0]] < plan.first_pruned


def parameter_groups(
    family: Family,
    student: nn.Module,
    plan: PrunePlan,
    report: ContributionReport | None,
    recipe: Recipe,
    rate: float,
) -> list[dict[str, Any]]:
    """Return optimizer groups by update strength, and turn off gradients for frozen parameters.

    PWP freezes the blocks before the first pruned one, and the embedders before them.

    Args:
        rate: the learning rate at strength 1.

    Raises:
        InputError: every parameter is frozen.
    """
    strength = strengths(
        report, plan, family.components, sensitivity=recipe.sensitivity, freeze_prefix=recipe.freeze_prefix
    )
    config: Any = student.config
    groups: dict[float, list[nn.Parameter]] = {}
    low_rank = any(lora.is_low_rank(name) for name, _ in student.named_parameters())
    for name, parameter in student.named_parameters():
        place = family.place(config, name)
        value = 1.0
        if place is not None and place[1] is not None:
            value = strength.get((plan.kept[place[0]], place[1]), 1.0)
        frozen = recipe.freeze_prefix and in_prefix(family, config, plan, name)
        frozen |= low_rank and not lora.is_trained(name)
        parameter.requires_grad_(not frozen)
        if not frozen:
            groups.setdefault(value, []).append(parameter)
    if not groups:
        raise InputError("nothing is left to train: every part is frozen; use --no-freeze-prefix")
    return [{"params": p, "lr": rate * s, "strength": s} for s, p in sorted(groups.items())]


def adapt(family: Family, student: nn.Module, plan: PrunePlan, recipe: Recipe, options: DistillOptions) -> None:
    """Add low-rank matrices to the layers of blocks that are trained, where the options ask for that, in place.

    Raises:
        MissingExtraError: peft is not installed.
    """
    rank, config = rank_of(options.train), student.config
    if rank is None:
        return
    names = []
    for name, layer in student.named_modules():
        place = family.place(cast("Any", config), f"{name}.weight")
        frozen = place is None or (recipe.freeze_prefix and plan.kept[place[0]] < plan.first_pruned)
        if isinstance(layer, nn.Linear) and not frozen and not lora.is_trained(f"{name}.weight"):
            names.append(name)
    lora.add(student, names, rank, options.seed)


@dataclass(frozen=True)
class Placement:
    """Where training runs, and in how many micro-batches. The result does not depend on it, except for rounding."""

    accumulate: int = 1
    """The number of micro-batches in a process's share of the batch; their gradients are summed."""
    teacher_offload: bool = False
    """Keep the teacher's weights on the CPU and move them to the device layer by layer."""
    ema_offload: bool = False
    """Keep the moving average of the weights on the CPU."""

    def micro_batches(self, batch: int, processes: int) -> int:
        """Return into how many micro-batches all processes together divide a batch.

        Raises:
            InputError: it cannot be divided evenly.
        """
        count = processes * self.accumulate
        if self.accumulate < 1 or batch % count:
            raise InputError(
                f"--batch: found {batch}, expected a multiple of {count}, the number of processes times --accumulate"
            )
        return count

    def check_sharded(self, optimizer: str) -> None:
        """Refuse what FSDP and DeepSpeed cannot shard.

        Raises:
            InputError: the optimizer keeps moments in 8 bits, or the average is kept on the CPU.
        """
        if optimizer != ADAMW:
            raise InputError(f"--optimizer: found {optimizer}, expected {ADAMW} where FSDP or DeepSpeed shards it")
        if self.ema_offload:
            raise InputError("--ema-offload: FSDP and DeepSpeed shard the average; omit it")


HERE = Placement()
"""One micro-batch per process, with the teacher on the device."""
