"""`compress`: all stages and the report in one call, and what it would cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import (
    AnyPath,
    check_places,
    check_prompts,
    is_begun,
    open_folder,
    source_and_images,
    world_given,
)
from edgeprune.common import heap, traffic
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.common.intervals import Interval
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.planning.fit import Fit
    from edgeprune.planning.plan import PrunePlan
    from edgeprune.sampling.generation import Generation, GenerationOptions
    from edgeprune.stages.options import CompressOptions


@dataclass(frozen=True)
class ReportQuality:
    """How many images show what their prompt asks for, by the checker of shapes world; shares with 95 % intervals."""

    metric: str
    original: Interval
    compressed: Interval
    relative_drop: Interval | None
    """As a share of the original's score, paired by prompt."""
    tasks: dict[str, dict[str, Interval]]
    """By `original` and `compressed`, by task."""


@dataclass(frozen=True, kw_only=True)
class ReportFigures:
    """What the report measured, on this machine in torch: the content of report.json."""

    prompts: list[str]
    seeds: list[int]
    images: int
    original_bf16_bytes: int
    """The original transformer's weights."""
    compressed_int4_bytes: int
    """The compressed transformer's weights on disk."""
    weights_ratio: float
    original_step_s: float
    """One denoising step, in `step_dtype`; of a model that is read block by block, from the time of its blocks."""
    pruned_step_s: float
    """The same without the removed parts, and without guidance where that was learned; not quantized."""
    step_ratio: float
    """Median of the ratios of pairs of steps, taken in turns."""
    step_ratio_quartiles: tuple[float, float] | None = None
    """Half of the pairs have a ratio between these; None of a single pair, or in a report of an earlier version."""
    step_dtype: str = "fp32"
    psnr_db: float
    """Mean over images at equal seeds."""
    generation: dict[str, Any]
    """How the images were made, see `Generation`."""
    inputs: dict[str, Any]
    """Digests of what was measured."""
    quality: ReportQuality | None = None
    """For a teacher of shapes world."""

    @classmethod
    def of(cls, summary: dict[str, Any]) -> ReportFigures:
        """Build the figures from the content of report.json."""
        quality, quartiles = summary.get("quality"), summary.get("step_ratio_quartiles")
        typed = {
            "quality": None if quality is None else ReportQuality(**_with_intervals(quality)),
            "step_ratio_quartiles": None if quartiles is None else tuple(quartiles),
        }
        return cls(**summary | typed)

    def to_json(self) -> dict[str, Any]:
        """Return the content of report.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _with_intervals(value: Any) -> Any:
    """Return JSON with an Interval in place of each list of three."""
    from edgeprune.common.intervals import Interval

    if isinstance(value, dict):
        return {key: _with_intervals(inner) for key, inner in value.items()}
    return Interval(*value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`."""

    out: Path
    ran: tuple[str, ...]
    """The stages that were not done yet, in their order."""
    plan: PrunePlan
    """What was removed, and the size before and after."""
    options: CompressOptions
    """The options that were used."""
    fit: Fit | None
    """The memory of the device, in bytes, where `options.plan.fit` names one."""
    removable: str
    """Which blocks the options let go, and of which kinds they are; empty for `manual`."""
    resident_bytes: int
    """Of what is left in INT4, the bytes that exports hold in memory in each step."""
    report: ReportFigures | None
    """What report.html shows; None without a report."""
    no_report: str
    """Why there is no report; empty if there is one."""
    read_bytes: int
    """Of weights and of files that were hashed or copied, by this process; bytes in the system's cache count too."""
    written_bytes: int
    distillation: str
    """How much it was trained, in words; `not distilled` without data for a model that draws no shapes world."""
    choice: dict[str, Any] | None = None
    """What `time_s` chose: the fields of `Choice` in stages/choice.py."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune compress --json` prints."""
        figures = self.report.to_json() if self.report else {}
        moved = {"read_bytes": self.read_bytes, "written_bytes": self.written_bytes}
        chosen = {"choice": self.choice} if self.choice else {}
        made = {"out": str(self.out), "ran": list(self.ran), "distillation": self.distillation}
        return made | chosen | moved | figures


@dataclass(frozen=True)
class CompressForecast:
    """What `compress` would cost. Times are floors: they assume the speed of a plain matrix product."""

    blocks: int
    parameters: int
    """Of the transformer."""
    parameters_left: int
    int4_bytes: int
    """The compressed transformer's weights."""
    analyze_parts: int
    analyze_prompts: int
    analyze_evaluations: int
    """Forward passes of one sample through the transformer."""
    distill_steps: int
    data_evaluations: int
    report_evaluations: int
    analyze_floor_s: float
    plan_floor_s: float
    prune_floor_s: float
    data_floor_s: float
    distill_floor_s: float
    quantize_floor_s: float
    encoders_floor_s: float
    report_floor_s: float
    evaluation_flops: int
    matmul_flops_per_s: int
    analyze_memory_bytes: int
    """The memory that the stage takes at least, with that of the process; 0 if it does not run."""
    plan_memory_bytes: int
    prune_memory_bytes: int
    distill_memory_bytes: int
    quantize_memory_bytes: int
    encoders_memory_bytes: int
    report_memory_bytes: int
    written_bytes: int
    choice: dict[str, Any] | None = None
    """What `time_s` chose: the fields of `Choice` in stages/choice.py."""

    def described_choice(self) -> str:
        """Return what `time_s` chose in a line; empty without it."""
        from edgeprune.stages.choice import Choice

        return Choice(**self.choice).described() if self.choice else ""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune compress --dry-run --json` prints."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compress(
    model: AnyPath | None,
    out: AnyPath,
    options: CompressOptions | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
    time_s: float | None = None,
    quick: bool = False,
    no_half: bool = False,
    fresh: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Run all stages that are not done yet, and write a report. An interrupted call resumes.

    Args:
        model: a diffusers folder or a hub id; None for the model of `out`, or the built-in one where `out` is new.
        out: the artefact folder to create or to resume.
        options: of all stages; None for the preset `default`, or `quick` with `quick`. See `preset`, which trains
            a model that draws no shapes world only with data.
        revision: a branch, tag or commit of a hub id; None for its default. A begun folder keeps its commit.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        generation: settings of images to change; None keeps the model's own.
        compute: where networks run, and in how much memory; None takes what this machine has.
        time_s: seconds in which all stages and the report shall end: chooses, once, how much is analyzed, trained,
            calibrated and drawn, of what `options` ask for. None keeps the choice that a folder was begun with.
        quick: a first look: the report draws few images.
        no_half: do not write the pruned weights in half precision: INT4 is made from the original. Not with training.
        fresh: redo stages that were done with other options.
        progress: called after each part of each stage.

    Raises:
        BudgetError: the budget cannot be met; raised before anything is computed.
        InputError: the model, the data or an option is not usable.
        MissingExtraError: a package that the metric needs is not installed.
        StaleStageError: the folder was begun with another model, revision or variant, or a stage was done with other
            options and `fresh` is not set.
        LockedError: another process uses the folder.
        DiskError: the disk is full; the next call resumes.
    """
    heap.large_pages()
    chosen = _checked(model, out, options, revision, quick, no_half)
    before = traffic.total()
    from edgeprune.planning.budget import resident_bytes
    from edgeprune.planning.removable import Removable
    from edgeprune.report import make
    from edgeprune.stages import choice as choices
    from edgeprune.stages import compress as stages
    from edgeprune.stages.distill import amount

    if not is_begun(out):
        source, images = source_and_images(out, model, revision, generation, variant)
        rehearsed = stages.rehearse(source, images, chosen)
        if time_s is None:  # else it depends on what is chosen
            _need_memory(out, source, images, chosen, rehearsed, compute)
        stages.need_room(Path(out), source, rehearsed, chosen, no_half=no_half)  # before the folder is created
    ws = open_folder(
        out, model, revision=revision, variant=variant, fresh=fresh, begin=True, generation=generation, compute=compute
    )
    choice = choices.settle(ws, chosen, time_s, progress, quick=quick)
    if choice:
        ws.longest_s, chosen = None, choice.over(chosen, ws.family.kinds(ws.config))
    fit = ws.fit(chosen.plan.fit, chosen.text_form) if chosen.plan.fit else None
    ran = stages.compress(ws, chosen, progress, no_half=no_half)
    no_report = make.left_out(ws, quick=quick)
    figures = None
    if not no_report:
        figures = ReportFigures.of(make.make_report(ws, quick=quick, redo=bool(ran), progress=progress))
    moved = traffic.total().since(before)
    return Compressed(
        out=ws.out,
        ran=tuple(ran),
        plan=ws.plan(),
        options=chosen,
        fit=fit,
        removable=Removable.shown(ws.family, ws.config, chosen.plan),
        resident_bytes=resident_bytes(ws.family, ws.config, ws.plan(), chosen.plan.group_size),
        report=figures,
        no_report=no_report,
        distillation=amount(ws),
        read_bytes=moved.read_bytes,
        written_bytes=moved.written_bytes,
        choice=ws.manifest.choice,
    )


def forecast_compress(
    model: AnyPath | None,
    out: AnyPath,
    options: CompressOptions | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
    time_s: float | None = None,
    quick: bool = False,
    no_half: bool = False,
) -> CompressForecast:
    """Forecast what `compress` with these arguments would cost, from configs and headers alone. Nothing stays written.

    With `time_s`, blocks of the transformer are timed, too, and the forecast is of what would be chosen.

    Raises:
        BudgetError: the budget cannot be met.
        InputError: the model or an option is not usable, or the transformer needs more memory than `compute` gives.
        DiskError: the disk has too little room for what would be written.
    """
    chosen = _checked(model, out, options, revision, quick, no_half)
    from edgeprune.common.memory import ComputeOptions as Options
    from edgeprune.residency.compute import Compute
    from edgeprune.stages.choice import rehearse_choice
    from edgeprune.stages.compress import check_training, forecast, need_room, rehearse

    source, images = source_and_images(out, model, revision, generation, variant)
    check_training(chosen, Compute.of(compute or Options()))
    rehearsed = rehearse(source, images, chosen)
    if time_s is None:
        _need_memory(out, source, images, chosen, rehearsed, compute)
    if not is_begun(out):
        need_room(Path(out), source, rehearsed, chosen, no_half=no_half)
    scratch = next(place for place in (Path(out), *Path(out).resolve().parents) if place.is_dir())
    given: dict[str, Any] = {"compute": compute, "scratch": scratch, "no_half": no_half}
    if time_s is None:
        return CompressForecast(**forecast(source, chosen, images, quick=quick, **given))
    choice, chosen = rehearse_choice(source, chosen, images, time_s, variant, compute, scratch, quick=quick)
    _need_memory(out, source, images, chosen, rehearsed, compute)
    numbers = forecast(source, chosen, images, images=choice.images, steps=choice.image_steps, **given)
    return CompressForecast(**numbers, choice=asdict(choice))


def _need_memory(
    out: AnyPath,
    source: Path,
    generation: Generation,
    options: CompressOptions,
    plan: PrunePlan,
    compute: ComputeOptions | None,
) -> None:
    """Refuse too little memory for one of the stages that a folder lacks."""
    from edgeprune.artefact.manifest import Manifest
    from edgeprune.artefact.resolve import read_original
    from edgeprune.residency.compute import Compute
    from edgeprune.stages.compress import need_memory
    from edgeprune.stages.memory import Memory
    from edgeprune.stages.work import Subject

    if compute is not None:
        config, family = read_original(source)
        done = Manifest.load(Path(out)).stages if is_begun(out) else ()
        need_memory(Memory(Subject(source, family, config, generation), Compute.of(compute)), options, plan, done)


def _checked(
    model: AnyPath | None,
    out: AnyPath,
    options: CompressOptions | None,
    revision: str | None,
    quick: bool,
    no_half: bool,
) -> CompressOptions:
    """Return the options, or the preset's, after checks that need no model."""
    check_places(out, model, revision)
    from edgeprune.data.settings import check_source
    from edgeprune.stages.compress import preset
    from edgeprune.stages.encoders import check as check_encoders

    world = world_given(out, model)
    chosen = options or preset("quick" if quick else "default", world=world)
    if no_half and chosen.distill is not None:
        raise InputError("--no-half: training ends in weights in half precision; give --steps 0, or omit --no-half")
    chosen.check_data(world=world)
    chosen.settled(0)
    check_encoders(chosen.text_form)
    if chosen.distill is not None:
        chosen.distill.check()
    check_prompts(chosen.analyze.prompts)
    check_prompts(chosen.plan.prompts)
    if chosen.distill is not None and chosen.data.source:
        check_source(chosen.data.source)
    return chosen
