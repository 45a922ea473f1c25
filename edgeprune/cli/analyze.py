"""`edgeprune analyze`: how much each block and component contributes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.api.folders import check_places, check_prompts
from edgeprune.cli import limits, options, screen
from edgeprune.common import processes

EPILOG = "Example: edgeprune analyze -o small --joint  ·  edgeprune analyze ./sd35 --dry-run --pairs"


def analyze(
    model: options.Model = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    out: options.Out = Path("compressed"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time one evaluation, show the expected cost and stop.")
    ] = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    metric: options.Metric = "velocity",
    weights: options.MetricWeights = None,
    prompts: options.Prompts = None,
    count: options.Count = None,
    states: options.States = None,
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
    estimator: options.Estimator = None,
    inference_steps: options.InferenceSteps = None,
    guidance_scale: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    config: limits.LaunchConfig = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:  # fmt: skip
    """Score the model without each block and component: analysis.json."""
    if config and not processes.launched() and not dry_run:
        from edgeprune.training.launch import launch

        return launch(config, sys.argv[1:])
    check_places(out, model, revision)
    check_prompts(prompts)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    from edgeprune.metrics import parse_weights

    chosen = api.AnalyzeOptions(
        metric=metric, prompts=prompts, components=not only_blocks, weights=parse_weights(weights or []),
        joint=joint, pairs=pairs, states=states, **options.given(count=count, estimator=estimator),
    )  # fmt: skip
    generation = api.GenerationOptions(
        num_inference_steps=inference_steps, guidance_scale=guidance_scale, height=height, width=width
    )
    if dry_run:
        numbers = api.forecast_analyze(
            model, out, chosen, revision=revision, variant=variant, generation=generation, compute=compute
        ).to_json()
        remark = "measured on one sample here; batches take less time per sample"
        return screen.show_forecast(numbers, remark, as_json)
    with screen.bars() as progress:
        done = api.analyze(
            model,
            out,
            chosen,
            revision=revision,
            variant=variant,
            generation=generation,
            compute=compute,
            fresh=fresh,
            progress=progress,
        )
    _show(done, as_json)


def _show(done: api.Analyzed, as_json: bool) -> None:
    """Show the least contributing parts."""
    order = sorted(done.report.contributions().values(), key=lambda c: c.drop)
    known = len(done.report.prompts) > 1
    screen.table([(str(c), f"{c.drop:.4f}" + (f" ± {c.half_width:.4f}" if known else "")) for c in order[:8]])
    screen.say(
        f"least contributing parts first: loss of the {done.report.metric} score"
        + (" with its 95 % interval" if known else "; one prompt gives no interval")
        + ("" if done.ran else " (already done)")
    )
    if as_json:
        screen.print_json(done.to_json())
    screen.say(
        f"next: edgeprune plot {screen.quoted(done.path)} -o {screen.quoted(done.out, '/plots')}, "
        f"or: edgeprune plan -o {screen.quoted(done.out)} --keep 0.79"
    )
