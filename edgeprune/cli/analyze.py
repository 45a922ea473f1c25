"""`edgeprune analyze`: how much each block and component contributes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.cli import choices, options, screen
from edgeprune.cli.folder import check_model, check_out, check_prompts, images_of, is_begun, workspace
from edgeprune.common import processes

EPILOG = "Example: edgeprune analyze -o small --joint  ·  edgeprune analyze ./sd35 --dry-run --pairs"


def analyze(
    model: options.Model = None,
    out: options.Out = Path("compressed"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time one evaluation, show the expected cost and stop.")
    ] = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    metric: options.Metric = "velocity",
    weights: options.MetricWeights = None,
    prompts: options.Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Number of prompts.", rich_help_panel=options.ANALYSIS)] = 28,
    only_blocks: Annotated[
        bool,
        typer.Option("--only-blocks", help="Score whole blocks only, no components.", rich_help_panel=options.ANALYSIS),
    ] = False,
    joint: Annotated[
        bool,
        typer.Option(
            "--joint", help="Also score groups of a block's components together.", rich_help_panel=options.ANALYSIS
        ),
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Also score pairs of parts, for `plan --method milp`.", rich_help_panel=options.ANALYSIS
        ),
    ] = False,
    estimator: Annotated[
        str,
        choices.choice(
            names=lambda: options.ESTIMATORS, rich_help_panel=options.ANALYSIS,
            help="How scores are obtained. exhaustive runs the model without each part. reuse gives the same numbers "
            "for half the work, gates estimates them from gradients in one pass; both need --metric velocity.",
        ),
    ] = "exhaustive",
    inference_steps: options.InferenceSteps = None,
    guidance_scale: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    config: options.LaunchConfig = None,
) -> None:  # fmt: skip
    """Score the model without each block and component: analysis.json."""
    if config and not processes.launched() and not dry_run:
        from edgeprune.training.launch import launch

        return launch(config, sys.argv[1:])
    check_out(out)
    check_model(model)
    check_prompts(prompts)
    from edgeprune.metrics import check_analysis, parse_weights
    from edgeprune.stages.analyze import run as run_analyze
    from edgeprune.stages.options import AnalyzeOptions

    chosen = AnalyzeOptions(
        metric=metric, prompts=prompts, count=count, components=not only_blocks, weights=parse_weights(weights or []),
        joint=joint, pairs=pairs, estimator=estimator,
    )  # fmt: skip
    check_analysis(chosen.metric, chosen.weights)  # before the folder is created
    images_set = options.given(
        num_inference_steps=inference_steps, guidance_scale=guidance_scale, height=height, width=width
    )
    if dry_run:
        return _forecast(model, out, chosen, images_set, as_json)
    ws = workspace(out, model, fresh=fresh, begin=True, generation=images_set)
    with screen.bars() as progress:
        ran = run_analyze(ws, chosen, progress)
    _show(ws, ran, as_json)


def _forecast(model: str | None, out: Path, chosen: Any, images_set: dict[str, Any], as_json: bool) -> None:
    """Show the cost of an analysis."""
    from edgeprune.artefact.resolve import resolve
    from edgeprune.stages.analyze import forecast

    ws = workspace(out) if model is None and is_begun(out) else None
    source = ws.source if ws else resolve(model)
    numbers = forecast(source, chosen, images_of(source, ws, images_set))
    remark = "measured on one sample here, with float32 weights; batches take less time per sample"
    screen.show_forecast(numbers, remark, as_json)


def _show(ws: Any, ran: bool, as_json: bool) -> None:
    """Show the least contributing parts."""
    report = ws.report()
    assert report is not None
    order = sorted(report.contributions().values(), key=lambda c: c.drop)
    screen.table([(str(c), f"{c.drop:.4f} ± {c.half_width or 0:.4f}") for c in order[:8]])
    screen.say(
        f"least contributing parts first: loss of the {report.metric} score with its 95 % interval"
        + ("" if ran else " (already done)")
    )
    if as_json:
        screen.print_json(report.to_json())
    screen.say(
        f"next: edgeprune plot {ws.report_path} -o {ws.out / 'plots'}, or: edgeprune plan -o {ws.out} --keep 0.79"
    )
