"""`analyze`: how much each block and component of a model contributes, and what finding out would cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, check_places, check_prompts, open_folder, source_and_images
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.stages.options import AnalyzeOptions


@dataclass(frozen=True)
class Analyzed:
    """The result of `analyze`."""

    out: Path
    ran: bool
    """False if the stage was done already."""
    report: ContributionReport
    """The scores; `report.contributions()` gives the drop without each part, with its interval."""

    @property
    def path(self) -> Path:
        """The file of the scores."""
        return self.out / "analysis.json"

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune analyze --json` prints: the content of analysis.json."""
        return self.report.to_json()


@dataclass(frozen=True)
class AnalyzeForecast:
    """What `analyze` would cost."""

    blocks: int
    groups: int
    """Groups of parts that are removed, one after the other, and the untouched model."""
    evaluations: int
    """Forward passes of one sample through the transformer."""
    evaluation_s: float
    analysis_s: float
    weights_bytes: int
    """What the transformer has in memory while it runs."""
    held_bytes: int
    """What the estimator keeps, without the weights and the activations of a forward pass."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune analyze --dry-run --json` prints."""
        return asdict(self)


def analyze(
    model: AnyPath | None,
    out: AnyPath,
    options: AnalyzeOptions | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Analyzed:
    """Score a model without each block and component, and write analysis.json. An interrupted call resumes.

    Args:
        model: a diffusers folder or a hub id; None for the model of `out`, or the built-in one where `out` is new.
        out: the artefact folder to create or to resume.
        options: metric, prompts and parts; None for the defaults.
        revision: a branch, tag or commit of a hub id; None for its default. A begun folder keeps its commit.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        generation: settings of images to change; None keeps the model's own.
        compute: where networks run, and in how much memory; None takes what this machine has.
        fresh: analyze again where that was done with other options.
        progress: called after each group of parts.

    Raises:
        InputError: the model or an option is not usable.
        MissingExtraError: a package that the metric needs is not installed.
        StaleStageError: the folder was begun with another model, revision or variant, or it was analyzed with other
            options and `fresh` is not set.
        LockedError: another process uses the folder.
    """
    check_places(out, model, revision)
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.stages.analyze import run

    chosen = _checked(options)
    ws = open_folder(
        out, model, revision=revision, variant=variant, fresh=fresh, begin=True, generation=generation, compute=compute
    )
    ran = run(ws, chosen, progress)
    return Analyzed(out=ws.out, ran=ran, report=ContributionReport.load(ws.report_path))


def forecast_analyze(
    model: AnyPath | None,
    out: AnyPath,
    options: AnalyzeOptions | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
) -> AnalyzeForecast:
    """Forecast what `analyze` with these arguments would cost: times one evaluation, and writes nothing.

    Raises:
        InputError: the model or an option is not usable.
        MissingExtraError: a package that the metric needs is not installed.
    """
    check_places(out, model, revision)
    from edgeprune.stages.analyze import forecast

    chosen = _checked(options)
    source, images = source_and_images(out, model, revision, generation, variant)
    return AnalyzeForecast(**forecast(source, chosen, images, variant, compute))


def _checked(options: AnalyzeOptions | None) -> AnalyzeOptions:
    """Return the options, or the defaults; a folder is created only after this."""
    from edgeprune.metrics import check_analysis
    from edgeprune.stages.options import AnalyzeOptions

    chosen = options or AnalyzeOptions()
    check_prompts(chosen.prompts)
    check_analysis(chosen.metric, chosen.weights)
    return chosen
