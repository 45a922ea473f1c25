"""`edgeprune tune`: the fewest evaluations within a bound of quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune import api
from edgeprune.cli import choices, limits, options, screen
from edgeprune.common.tables import interval_text

if TYPE_CHECKING:
    from edgeprune.api.tuning import Tuned
    from edgeprune.common.intervals import Interval

EPILOG = (
    "Example: edgeprune tune small  ·  edgeprune tune small-onnx --psnr-bound 0.5 --count 210  ·  "
    "edgeprune tune ./sd35 --weights clip=./clip --device cuda --dry-run"
)


def tune(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Exported folder, artefact folder or diffusers folder.")
    ],
    psnr_bound: Annotated[
        float,
        typer.Option(
            min=0, metavar="DB",
            help="How far the PSNR to the exact solution may be below that of the present settings. Here and in the "
            "next option, the upper end of the 95 % interval counts.",
        ),
    ] = 1.0,
    score_bound: Annotated[
        float,
        typer.Option(
            min=0, max=1, metavar="SHARE",
            help="How far the metric's score may be below that of the present settings, as a share of it.",
        ),
    ] = 0.02,
    metric: Annotated[
        str | None,
        choices.choice(
            names=choices.image_metrics, help="Metric of the images alone.",
            show_default="shapes for teachers of shapes world, clip if its weights are given, else none",
        ),
    ] = None,
    weights: Annotated[list[str] | None, options.weights_of_metrics()] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text file with one prompt per line. Judge what was chosen on others.",
            show_default="the metric's tuning prompts, else tuning captions of edgeprune",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Number of prompts.", show_default="105 of shapes, 16 captions, or all of the file"),
    ] = None,
    runtime: options.RuntimeName = None,
    device: limits.TorchDevice = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
    no_write: Annotated[
        bool, typer.Option("--no-write", help="Show the choice; write nothing. Such a run does not resume.")
    ] = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Find the solver, steps and range of guidance with the fewest evaluations, and write them into generation.json."""
    from edgeprune.metrics import parse_weights

    compute = limits.compute_options(device, memory, yes=yes or dry_run, longest=None if dry_run else longest)
    with screen.bars() as progress:
        given: dict[str, Any] = {
            "metric": metric, "weights": parse_weights(weights or []), "prompts": prompts, "count": count,
            "runtime": runtime, "compute": compute, "progress": progress,
        }  # fmt: skip
        if dry_run:
            forecast = api.forecast_tune(folder, **given)
        else:
            done = api.tune(folder, psnr_bound_db=psnr_bound, score_bound=score_bound, write=not no_write, **given)
    if dry_run:
        remark = "at the speed of one timed evaluation; a search may take half or twice as many"
        return screen.show_forecast(forecast.to_json(), remark, as_json)
    screen.table(_rows(done))
    screen.say(
        f"{done.prompts} images of each, prompts and seeds of the tuning split; PSNR to the exact solution; drops "
        "against the first row; 95 % intervals over prompts"
    )
    old, new = done.trials[0].evaluations, done.chosen.evaluations
    if done.new == done.old:
        screen.say(f"{folder}: nothing cheaper is within the bounds; {old} evaluations an image, as before")
    else:
        screen.say(
            f"{folder}: {done.chosen.name}: {new} instead of {old} evaluations an image"
            + ("; written to generation.json, what was there is in tuning.json" if done.written else "")
        )
    if as_json:
        screen.print_json(done.to_json())


def _rows(done: Tuned) -> list[tuple[str, ...]]:
    """Return the rows of the table, in the order of the trials."""
    scored = done.metric is not None
    head = ("", "evaluations", "PSNR, dB", "drop, dB", *((done.metric or "", "relative drop") if scored else ()), "")
    rows: list[tuple[str, ...]] = [head]
    for trial in done.trials:
        more = (_shown(trial.score, ".3f"), _shown(trial.score_drop, ".1%")) if scored else ()
        verdict = "chosen" if trial == done.chosen else "" if trial.good else "beyond the bounds"
        psnr, drop = _shown(trial.psnr, ".1f"), _shown(trial.psnr_drop, ".2f")
        rows.append((trial.name, str(trial.evaluations), psnr, drop, *more, verdict))
    return rows


def _shown(interval: Interval | None, style: str) -> str:
    return "" if interval is None else interval_text(interval, style)
