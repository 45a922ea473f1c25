"""`tune`: settings of images with the fewest evaluations within a bound of quality. Needs no torch for an export."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.drawing import torch_options
from edgeprune.api.folders import AnyPath
from edgeprune.common.errors import InputError
from edgeprune.common.extras import TORCH
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.tuning.bounds import Bounds

if TYPE_CHECKING:
    from edgeprune.sampling.generation import Generation
    from edgeprune.tuning.trials import Trial, Trials

REPORT = "tuning.json"
"""Next to generation.json: what was tried, and the settings before."""
PSNR_BOUND_DB, SCORE_BOUND = 1.0, 0.02
SHAPES, CAPTIONS = 105, 16
"""Prompts: of shapes world, whose images are small, and captions for other models."""
EXPORT = "edgeprune_export.json"


@dataclass(frozen=True)
class TuneForecast:
    """What `tune` takes."""

    images: int
    """Of each setting that is tried."""
    evaluations: int
    """Of the transformer, as many as a search takes whose choice needs 0.4 of the present ones."""
    seconds: float
    """At the speed of a timed evaluation."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune tune --dry-run --json` prints."""
        return {"images": self.images, "evaluations": self.evaluations, "expected_s": round(self.seconds, 1)}


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`."""

    old: Generation
    """The settings before."""
    new: Generation
    """Those with the fewest evaluations within the bounds; the old ones where nothing cheaper is."""
    trials: tuple[Trial, ...]
    """All that were tried, the old ones first."""
    metric: str | None
    """The reference-free metric."""
    psnr_bound_db: float
    score_bound: float
    prompts: int
    written: bool
    """Whether generation.json was written."""

    @property
    def chosen(self) -> Trial:
        """The trial of the new settings."""
        return next(trial for trial in self.trials if trial.generation == self.new)

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune tune --json` prints and tuning.json holds; docs/run.md describes it."""
        return {
            "schema_version": 1,
            "old": self.old.to_json() | {"solver": self.old.solver},
            "new": self.new.to_json() | {"solver": self.new.solver},
            "old_evaluations": self.trials[0].evaluations,
            "new_evaluations": self.chosen.evaluations,
            "metric": self.metric,
            "psnr_bound_db": self.psnr_bound_db,
            "score_bound": self.score_bound,
            "split": Split.TUNING.value,
            "prompts": self.prompts,
            "trials": [trial.to_json() for trial in self.trials],
            "written": self.written,
        }


def forecast_tune(
    folder: AnyPath,
    *,
    metric: str | None = None,
    weights: Mapping[str, str] | None = None,
    prompts: AnyPath | None = None,
    count: int | None = None,
    runtime: str | None = None,
    compute: ComputeOptions | None = None,
    progress: Progress = silent,
) -> TuneForecast:
    """Return what `tune` takes here; loads the model and times an image of one step. Nothing is written.

    The arguments and errors are those of `tune`.
    """
    with ExitStack() as stack:
        trials = _trials(
            stack, folder, Bounds(PSNR_BOUND_DB, SCORE_BOUND), metric=metric, weights=weights, prompts=prompts,
            count=count, runtime=runtime, compute=compute, write=False, progress=progress,
        )  # fmt: skip
        return _forecast(trials)


def tune(
    folder: AnyPath,
    *,
    psnr_bound_db: float = PSNR_BOUND_DB,
    score_bound: float = SCORE_BOUND,
    metric: str | None = None,
    weights: Mapping[str, str] | None = None,
    prompts: AnyPath | None = None,
    count: int | None = None,
    runtime: str | None = None,
    compute: ComputeOptions | None = None,
    write: bool = True,
    progress: Progress = silent,
) -> Tuned:
    """Find the solver, steps and range of guidance with the fewest evaluations, and write them into generation.json.

    All is judged on prompts and seeds of the tuning split: by PSNR to the exact solution with the folder's own
    guidance, and by a metric of the images alone. An interrupted call resumes, from the folder's `cache/tune`.

    Args:
        folder: an export, an artefact folder or a diffusers folder.
        psnr_bound_db: how far the PSNR to the exact solution may be below that of the present settings, in dB; of this
            and the next, the upper end of the 95 % interval counts.
        score_bound: how far the metric's score may be below that of the present settings, as a share of it.
        metric: of the images alone; None takes shapes for a teacher of shapes world and what is made from one, else
            clip if its weights are given, else none.
        weights: paths of the metric's weights by name.
        prompts: a text file with one prompt per line; None for tuning prompts of the metric, or captions.
        count: number of prompts, for shapes rounded up to whole tasks; None for 105 of shapes, 16 captions, or all of
            the file's.
        runtime: the runtime to draw with; None for the first installed one that fits.
        compute: where torch draws, in how much memory, and the longest time that this may take.
        write: write generation.json and tuning.json; False only returns the result.
        progress: called after each batch, and with a line for each trial.

    Raises:
        InputError: the folder, the metric or a prompt is not usable, the model has nothing to tune, or it takes longer
            than `compute.longest_s`.
        LockedError: another process tunes the folder.
        MissingExtraError: a package of the runtime or the metric is not installed.
    """
    with ExitStack() as stack:
        trials = _trials(
            stack, folder, Bounds(psnr_bound_db, score_bound), metric=metric, weights=weights, prompts=prompts,
            count=count, runtime=runtime, compute=compute, write=write, progress=progress,
        )  # fmt: skip
        _check_time(trials, compute or ComputeOptions(), progress)
        new = trials.choose()
        done = Tuned(
            old=trials.own, new=new, trials=tuple(trials.done), metric=trials.metric,
            psnr_bound_db=psnr_bound_db, score_bound=score_bound, prompts=len(trials.wanted), written=write,
        )  # fmt: skip
        if write:
            _write(Path(folder), done)
        return done


def _trials(
    stack: ExitStack,
    folder: AnyPath,
    bounds: Bounds,
    *,
    metric: str | None,
    weights: Mapping[str, str] | None,
    prompts: AnyPath | None,
    count: int | None,
    runtime: str | None,
    compute: ComputeOptions | None,
    write: bool,
    progress: Progress,
) -> Trials:
    """Check everything that can be checked before an image is drawn, and lock the folder."""
    from edgeprune import runtimes
    from edgeprune.api.folders import world_drawn
    from edgeprune.common.lock import LOCK, hold
    from edgeprune.metrics import require, scoring
    from edgeprune.runtimes.base import read_settings
    from edgeprune.sampling.generation import say_guesses
    from edgeprune.sampling.scheduler import FlowMatch
    from edgeprune.shapes import PLAIN
    from edgeprune.tuning import search, trials

    root, paths = Path(folder), dict(weights or {})
    chosen, asked = runtimes.choose(root, runtime), compute or ComputeOptions()
    runtimes.RUNTIMES[chosen].require()
    if chosen == TORCH:
        from edgeprune.artefact.checks import check_pipeline

        check_pipeline(root)
    say_guesses(root, ())
    costs = search.Costs(read_settings(root), FlowMatch.load(root))
    search.check(costs.settings.generation, guided=costs.guided)
    world = world_drawn(root)
    metric = metric or ("shapes" if world else "clip" if "clip" in paths else None)
    if metric and require(metric, paths).paired:
        raise InputError(f"--metric {metric}: compares images, as tune does by itself; give a metric of images alone")
    names = [metric] if metric else []
    own_prompts = prompts is None and metric == "shapes"
    per_task = -(-(count or SHAPES) // len((world or PLAIN).grammar.names)) if own_prompts else None
    wanted = scoring.wishes(
        names, prompts=Path(prompts) if prompts else None, per_task=per_task, split=Split.TUNING,
        captions=count or CAPTIONS, world=world,
    )  # fmt: skip
    if not own_prompts:
        wanted = wanted[:count]
    loading = torch_options(asked.device, [chosen]).get(chosen, {})
    loading |= {} if asked.memory is None else {"memory": asked.memory}
    if write:
        cache = root / "cache" / "tune"
        stack.enter_context(hold(cache / LOCK, root))
    else:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-tune-")))
    return trials.Trials(
        folder=root, costs=costs, wanted=wanted, metric=metric, weights=paths, world=world, bounds=bounds,
        runtime=chosen, loading=loading, cache=cache, progress=progress,
    )  # fmt: skip


def _forecast(trials: Trials) -> TuneForecast:
    evaluations = trials.evaluations()
    seconds = evaluations * trials.seconds() if evaluations else 0.0
    return TuneForecast(images=len(trials.wanted), evaluations=evaluations, seconds=seconds)


def _check_time(trials: Trials, compute: ComputeOptions, progress: Progress) -> None:
    """Say what is left to do, and refuse it if that takes too long.

    Raises:
        InputError: it takes longer than `longest_s`.
    """
    from edgeprune.common.tables import duration

    forecast = _forecast(trials)
    says = f"tune: about {duration(forecast.seconds)} here, {forecast.evaluations:,} evaluations of the transformer"
    if compute.longest_s is not None and forecast.seconds > compute.longest_s:
        fewer = max(1, int(forecast.images * compute.longest_s / forecast.seconds))
        raise InputError(f"{says}; --count {fewer} takes about {duration(compute.longest_s)}; --yes runs it anyway")
    if forecast.evaluations:
        progress(says)


def _write(folder: Path, done: Tuned) -> None:
    """Write tuning.json and generation.json; an export's record of hashes knows the new one."""
    from edgeprune.common.files import read_json, sha256_file, write_json
    from edgeprune.sampling.generation import FILE

    write_json(folder / REPORT, done.to_json())
    done.new.save(folder)
    path = folder / EXPORT
    if path.is_file():
        record = read_json(path)
        if isinstance(record.get("files"), dict):
            record["files"] |= {FILE: sha256_file(folder / FILE)}
            write_json(path, record)
