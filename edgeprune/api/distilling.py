"""`distill`: train the shorter transformer, and what a process needs for that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, check_begun, open_folder
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.stages.options import DataOptions
    from edgeprune.stages.workspace import Workspace
    from edgeprune.training.recipe import DistillOptions, Placement


@dataclass(frozen=True)
class Distilled:
    """The result of `distill`."""

    out: Path
    ran: bool
    """False if the stage was done already."""
    first_loss: float
    """Mean over the first ten steps, at most half of all."""
    last_loss: float
    """Mean over the last ten steps, at most half of all."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune distill --json` prints."""
        return {"out": str(self.out), "ran": self.ran, "first_loss": self.first_loss, "last_loss": self.last_loss}


@dataclass(frozen=True)
class MadeStates:
    """The result of `make_states`."""

    folder: Path
    states: int
    bytes: int
    """Of their files."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune distill --only-states --json` prints."""
        return {"folder": str(self.folder), "states": self.states, "bytes": self.bytes}


@dataclass(frozen=True)
class DistillForecast:
    """The memory that one process of `distill` holds, by what it is used for."""

    teacher_bytes: int
    student_bytes: int
    gradients_bytes: int
    moments_bytes: int
    """Of AdamW."""
    average_bytes: int
    """The moving average of the weights."""
    gathered_bytes: int
    """Blocks that are gathered from other processes to compute with them."""
    activations_bytes: int
    rank_bytes: int
    """The sum."""
    processes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune distill --dry-run --json` prints."""
        return asdict(self)


def distill(
    out: AnyPath,
    options: DistillOptions | None = None,
    data: DataOptions | None = None,
    *,
    placement: Placement | None = None,
    compute: ComputeOptions | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Distilled:
    """Train the pruned transformer to reproduce the original; the result replaces `transformer/`.

    An interrupted call resumes from its last saved state. Under `accelerate launch` every process calls this.

    Args:
        out: a pruned folder.
        options: the recipe; None for the default of the folder's model.
        data: what it learns from; None is the world of a teacher of shapes world, other models need data.
        placement: micro-batches, and where the teacher's weights are; None for one micro-batch on one device.
        compute: where it runs, in how much memory, and the longest time; None takes what this machine has, and any
            time. Of several processes, each trains where accelerate says; of these, the memory that training takes is
            not compared with what is given.
        fresh: train again where that was done with other options or other data.
        progress: called after each step and each part of the data.

    Raises:
        InputError: nothing is pruned yet, scores or data are missing, or an option or the data is not usable.
        StaleStageError: the folder was distilled with other options, and `fresh` is not set.
        LockedError: another process uses the folder.
        EdgepruneError: the loss is not finite; the last good state stays on disk.
    """
    check_begun(out)
    _check(data)
    ws = open_folder(out, fresh=fresh, compute=compute)
    from edgeprune.stages.compress import preset
    from edgeprune.stages.distill import run
    from edgeprune.training.recipe import HERE

    default = preset("default", world=ws.world)
    ran = run(ws, _chosen(ws, options), data or default.data, progress, placement=placement or HERE)
    stage = ws.manifest.stages["distill"]
    return Distilled(out=ws.out, ran=ran, first_loss=stage["first_loss"], last_loss=stage["last_loss"])


def make_states(
    out: AnyPath,
    options: DistillOptions | None = None,
    data: DataOptions | None = None,
    *,
    compute: ComputeOptions | None = None,
    progress: Progress = silent,
) -> MadeStates:
    """Make the states that a tail is trained from, of the first round, and train nothing.

    `distill` with the same options finds them, also on another machine that the folder was copied to. An interrupted
    call resumes.

    Args:
        out: a pruned folder.
        options: as for `distill`.
        data: as for `distill`.
        compute: where it runs, in how much memory, and the longest time; None takes what this machine has, and any
            time.
        progress: called after each block.

    Raises:
        InputError: see `distill`; or nothing would be trained from states.
        LockedError: another process uses the folder.
        DiskError: the disk is full.
    """
    check_begun(out)
    _check(data)
    ws = open_folder(out, compute=compute)
    from edgeprune.stages.compress import preset
    from edgeprune.stages.distill import make_states as make
    from edgeprune.training.states import States

    files = make(ws, _chosen(ws, options), data or preset("default", world=ws.world).data, progress)
    return MadeStates(files[0].parent, len(States(files)), sum(path.stat().st_size for path in files))


def forecast_distill(
    out: AnyPath,
    options: DistillOptions | None = None,
    *,
    placement: Placement | None = None,
    config: AnyPath | None = None,
    compute: ComputeOptions | None = None,
) -> DistillForecast:
    """Forecast the memory of `distill` from configs alone. Nothing is written.

    Args:
        out: a folder with a plan.
        options: the recipe; None for the default of the folder's model.
        placement: as for `distill`.
        config: YAML file of `accelerate config`, or the name of one that ships with edgeprune; None for one process.
        compute: where it would run; None takes what this machine has.

    Raises:
        InputError: there is no plan yet, or an option or the config is not usable.
    """
    ws = open_folder(out, compute=compute)
    from edgeprune.stages.distill import forecast
    from edgeprune.training.launch import launch_file
    from edgeprune.training.recipe import HERE

    file = launch_file(str(config)) if config else None
    return DistillForecast(**forecast(ws, _chosen(ws, options), placement or HERE, file))


def _check(data: DataOptions | None) -> None:
    """Refuse data that cannot be used, before the folder is opened."""
    from edgeprune.data.settings import check_source

    if data is not None and data.source:
        check_source(data.source)


def _chosen(ws: Workspace, options: DistillOptions | None) -> DistillOptions:
    """Return the options, or the default of the folder's model."""
    from edgeprune.stages.compress import preset
    from edgeprune.training.recipe import DistillOptions

    return options or preset("default", world=ws.world).distill or DistillOptions()
