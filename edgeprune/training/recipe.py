"""The options of distillation: what is trained for how long, what is frozen, and how strongly the rest is updated.

PWP freezes everything before the first pruned block. SGDistill updates a component the less, the more it contributes:
`graded` gives each component its own learning rate, `binary` freezes the half that contributes more.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import InputError
from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.training.losses import LossWeights

SENSITIVITIES = ("graded", "binary", "off")
SCHEDULES = ("constant", "cosine")
TEACHERS = ("float32", "bf16", "int8")
FEATURES = ("blocks", "attention")
_FLOOR = 0.1
"""The update strength of the component that contributes most, with `graded`."""


@dataclass(frozen=True)
class DistillOptions:
    """Everything that the result depends on, apart from the models and the data."""

    steps: int = 1000
    batch: int = 32
    rate: float = 1e-4
    schedule: str = "constant"
    sensitivity: str = "graded"
    freeze_prefix: bool = True
    """Freeze everything before the first pruned block (PWP)."""
    weights: LossWeights = LossWeights()
    features: str = "blocks"
    """The outputs that the feature loss compares: those of `blocks`, or of their `attention`."""
    ema: float = 0.99
    """The decay of the moving average of the weights."""
    drop_captions: float = 0.1
    """The fraction of samples trained with the empty prompt, for guidance."""
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    int4_group_size: int | None = 64
    """Train with weights rounded to INT4 in groups of this size; None trains without rounding."""
    teacher_precision: str = "float32"
    """The precision of the teacher's weights."""
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises:
            InputError: a value is not allowed; the message names the option.
        """
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
        """Return the options for digests and reports.

        Options added later appear only if they are used, so that the digests of older results stay valid.
        """
        later = {"teacher_precision": "float32"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


def strengths(
    report: ContributionReport | None, plan: PrunePlan, mode: str, components: tuple[str, ...]
) -> dict[tuple[int, str], float]:
    """Return the update strength in 0..1 of every component of every kept block, by original index.

    All kept components are ranked by contribution. `graded` falls linearly from 1 for the lowest to 0.1 for the
    highest; `binary` is 1 for the lower half and 0 for the other. A component without a score takes its block's score.
    Components without any score have strength 1.
    """
    kept = [(b, c) for b in plan.kept for c in components if (b, c) not in plan.removed]
    if mode == "off" or report is None:
        return dict.fromkeys(kept, 1.0)
    contributions = report.contributions()
    drops = {}
    for component in kept:
        contribution = contributions.get(component) or contributions.get((component[0], None))
        if contribution is not None:
            drops[component] = contribution.drop
    order = sorted(drops, key=lambda c: (drops[c], c))
    out = dict.fromkeys(kept, 1.0)
    for rank, component in enumerate(order):
        share = rank / max(1, len(order) - 1)
        out[component] = 1 - share * (1 - _FLOOR) if mode == "graded" else float(share < 0.5)
    return out


def parameter_groups(
    family: Family, student: nn.Module, plan: PrunePlan, report: ContributionReport | None, options: DistillOptions
) -> list[dict[str, Any]]:
    """Return optimizer groups by update strength, and turn off gradients for frozen parameters.

    PWP freezes the blocks before the first pruned one, and the embedders before them.

    Raises:
        InputError: every parameter is frozen.
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
    """Where training runs, and in how many micro-batches. The result does not depend on it, except for rounding."""

    accumulate: int = 1
    """The number of micro-batches in a process's share of the batch; their gradients are summed."""
    teacher_offload: bool = False
    """Keep the teacher's weights on the CPU and move them to the device layer by layer."""


HERE = Placement()
"""One micro-batch per process, with the teacher on the device."""
