"""What distillation is told: its options, which parts are frozen, and how strongly the others are updated.

PWP: everything before the first pruned block is frozen. SGDistill: the more a part contributes, the less it is updated
(`graded`: a learning rate of its own; `binary`: the more contributing half is frozen). What it leaves out: training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import InputError
from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.training.losses import Weights

SENSITIVITIES = ("graded", "binary", "off")
SCHEDULES = ("constant", "cosine")
TEACHERS = ("float32", "bf16", "int8")
FEATURES = ("blocks", "attention")
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
    teacher_precision: str = "float32"
    """Of the weights that the teacher computes with."""
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range, naming the option."""
        for name, value, allowed in (
            ("--sensitivity", self.sensitivity, SENSITIVITIES),
            ("--features", self.features, FEATURES),
            ("--schedule", self.schedule, SCHEDULES),
            ("--teacher-precision", self.teacher_precision, TEACHERS),
            ("--mixed-precision", self.mixed_precision, ("no", "bf16", "fp16")),
        ):
            if value not in allowed:
                raise InputError(f"{name}: found {value!r}, expected one of {', '.join(allowed)}")
        if self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise InputError(
                f"--steps, --batch, --rate: found {self.steps}, {self.batch}, {self.rate}, expected above 0"
            )

    def to_json(self) -> dict[str, Any]:
        """For digests and reports. Later options only where they are used, so that what was made before is current."""
        later = {"teacher_precision": "float32"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


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


@dataclass(frozen=True)
class Placement:
    """Where training is computed, and in which portions: nothing that the result depends on, but for rounding."""

    accumulate: int = 1
    """Portions of a process' share of the batch that gradients are summed over."""
    teacher_offload: bool = False
    """The teacher's weights stay on the CPU, and go to the device layer by layer."""


HERE = Placement()
"""All at once."""
