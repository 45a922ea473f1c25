"""The stages of an artefact folder, one function per stage: plan, prune and quantize.

A stage that was done with the same options is not done again. One that was done with other options is refused unless
`fresh` is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, open_folder
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.planning.fit import Fit
    from edgeprune.planning.options import PlanOptions
    from edgeprune.planning.plan import PrunePlan
    from edgeprune.stages.options import QuantizeOptions


@dataclass(frozen=True)
class Planned:
    """The result of `plan`."""

    out: Path
    ran: bool
    """False if the stage was done already."""
    plan: PrunePlan
    """What is removed, and the size before and after."""
    options: PlanOptions
    """The options that were used."""
    fit: Fit | None
    """The memory of the device, in bytes, where `options.fit` names one."""
    removable: str
    """Which blocks the options let go, and of which kinds they are; empty for `manual`."""
    resident_bytes: int
    """Of what is left in INT4, the bytes that exports hold in memory in each step."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune plan --json` prints: the content of plan.json."""
        return self.plan.to_json()


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`."""

    out: Path
    ran: bool
    """False if the stage was done already."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune prune --json` prints."""
        return {"out": str(self.out), "ran": self.ran}


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`."""

    out: Path
    ran: bool
    """False if the stage was done already."""
    weights_bytes: int
    """Bytes of the transformer's tensors on disk."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune quantize --json` prints."""
        return {"out": str(self.out), "ran": self.ran, "weights_bytes": self.weights_bytes}


def plan(
    out: AnyPath,
    options: PlanOptions | None = None,
    *,
    scores: AnyPath | None = None,
    compute: ComputeOptions | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Planned:
    """Choose which parts to remove, and write plan.json.

    Args:
        out: an artefact folder that `analyze` or `compress` began.
        options: method and budget; None for the defaults of the folder's model.
        scores: a file of contribution scores to use instead of the folder's own.
        compute: where networks run, in how much memory, and the longest time; None takes what this machine has, and
            any time.
        fresh: plan again where the folder was planned with other options.
        progress: gets a line that says what measuring the modulation takes, of a large model.

    Raises:
        BudgetError: no plan meets the budget.
        InputError: there is no such folder, an option or the scores are not usable, or measuring the modulation takes
            too long.
        StaleStageError: the folder was planned with other options, and `fresh` is not set.
        LockedError: another process uses the folder.
    """
    ws = open_folder(out, fresh=fresh, compute=compute)
    from edgeprune.planning.budget import resident_bytes
    from edgeprune.planning.removable import Removable
    from edgeprune.stages.compress import preset
    from edgeprune.stages.plan import run

    chosen = options or preset("default", world=ws.world).plan
    fit = ws.fit(chosen.fit) if chosen.fit else None
    ran = run(ws, chosen, None if scores is None else Path(scores), progress)
    removable = Removable.shown(ws.family, ws.config, chosen)
    made = ws.plan()
    resident = resident_bytes(ws.family, ws.config, made, chosen.group_size)
    return Planned(
        out=ws.out, ran=ran, plan=made, options=chosen, fit=fit, removable=removable, resident_bytes=resident
    )


def plan_of_config(config: AnyPath, options: PlanOptions | None = None, *, scores: AnyPath | None = None) -> PrunePlan:
    """Choose which parts to remove from a transformer's config alone, without weights. Nothing is written.

    Args:
        config: the transformer's config.json.
        options: method and budget; None for the defaults.
        scores: a file of contribution scores; methods that choose by contribution need it.

    Raises:
        BudgetError: no plan meets the budget.
        InputError: a file or an option is not usable, or the method needs scores.
    """
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.common.files import read_json
    from edgeprune.families import family_of
    from edgeprune.planning.options import DEFAULT

    chosen = options or DEFAULT
    chosen.check()
    report = None if scores is None else ContributionReport.load(Path(scores))
    if chosen.fit:
        raise InputError("--fit counts a pipeline's files: give -o (a folder), not --config")
    content = read_json(Path(config))
    if chosen.scored and report is None:
        raise InputError(f"--method {chosen.method} needs contribution scores; give --scores FILE")
    from edgeprune.planning.make import make_plan

    return make_plan(family_of(content, str(config)), content, report, chosen)


def prune(
    out: AnyPath,
    *,
    no_half: bool = False,
    compute: ComputeOptions | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Write the shorter transformer in half precision, `transformer/`, and put the rest of the pipeline beside it.

    Args:
        out: a folder with a plan.
        no_half: write only the config of `transformer/`: `quantize` makes INT4 from the original. Such a folder cannot
            be distilled, pushed or given a LoRA until a call without `no_half` has written the weights.
        compute: where networks run, and in how much memory; None takes what this machine has.
        fresh: prune again where the folder was pruned by another plan.
        progress: called after each file.

    Raises:
        InputError: there is no such folder or no plan, or a file is missing or damaged.
        StaleStageError: the folder was pruned by another plan, and `fresh` is not set.
        LockedError: another process uses the folder.
        DiskError: the disk is full; the next call resumes.
    """
    ws = open_folder(out, fresh=fresh, compute=compute)
    from edgeprune.stages.prune import run

    return Pruned(out=ws.out, ran=run(ws, progress, no_half=no_half))


def quantize(
    out: AnyPath,
    options: QuantizeOptions | None = None,
    *,
    encoders: str | None = None,
    compute: ComputeOptions | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Quantized:
    """Write the pruned weights as INT4 to `transformer_int4/`, block by block, and those of a T5 or Qwen3.

    Args:
        out: a pruned folder.
        options: group size and calibration; None for the defaults.
        encoders: how a T5 or Qwen3 is exported: `int4`, `int8` or `half`; None is `int4`, or `int8` without
            calibration.
        compute: where networks run, and in how much memory; None takes what this machine has.
        fresh: quantize again where that was done with other options.
        progress: called after each block.

    Raises:
        InputError: there is no such folder, nothing is pruned yet, or an option is not usable.
        StaleStageError: the folder was quantized with other options, and `fresh` is not set.
        LockedError: another process uses the folder.
        DiskError: the disk is full; the next call resumes.
    """
    ws = open_folder(out, fresh=fresh, compute=compute)
    from edgeprune.stages import encoders as text
    from edgeprune.stages.options import QuantizeOptions, encoders_of
    from edgeprune.stages.quantize import run
    from edgeprune.stages.workspace import ENCODERS_STAGE

    chosen = options or QuantizeOptions()
    form = encoders_of(encoders, chosen)
    text.check(form)
    if fresh or ENCODERS_STAGE not in ws.manifest.stages:
        text.check_time(ws, form, chosen.group_size, silent)  # refused before the transformer's hour
    ran = run(ws, chosen, progress)
    ran = text.run(ws, form, chosen.group_size, progress) or ran
    size: int = ws.manifest.stages["quantize"]["weights_bytes"]
    return Quantized(out=ws.out, ran=ran, weights_bytes=size)
