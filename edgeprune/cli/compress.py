"""`edgeprune compress`: all stages in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import choices, options, screen
from edgeprune.cli.folder import check_model, check_out, check_prompts, images_of, is_begun, workspace
from edgeprune.cli.plan import fit_rows, plan_rows
from edgeprune.common import heap

if TYPE_CHECKING:
    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages.options import CompressOptions
    from edgeprune.stages.workspace import Workspace

EPILOG = "Example: edgeprune compress -o small  ·  edgeprune compress ./sd35 -o small --max-memory 3.2GB"


Steps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Training steps; 0 skips distillation.",
        show_default="the preset's",
        rich_help_panel=options.TRAINING,
    ),
]


def compress(
    model: options.Model = None,
    out: options.Out = Path("compressed"),
    preset: Annotated[
        str, choices.choice(names=lambda: options.PRESETS, help="Where all other options start. quick is a first look.")
    ] = "default",
    dry_run: options.DryRun = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    keep: options.Keep = None,
    max_memory: options.MaxMemory = None,
    fit: options.FitTo = None,
    method: options.Method = None,
    modulation_rank: options.ModulationRank = None,
    protect_first: options.ProtectFirst = None,
    protect_last: options.ProtectLast = None,
    threshold: options.Threshold = None,
    blocks: options.Blocks = "",
    components: options.Components = "",
    steps: Steps = None,
    data: options.DataSource = None,
    metric: options.Metric = "velocity",
    weights: options.MetricWeights = None,
    prompts: options.Prompts = None,
    group_size: options.GroupSize = 64,
    calibration: options.Calibration = "none",
    inference_steps: options.InferenceSteps = None,
    guidance_scale: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
) -> None:
    """Run all stages: analyze, plan, prune, distill, quantize, and a report.

    An interrupted run resumes when you run the same command again.
    """
    heap.large_pages()
    check_out(out)
    check_model(model)
    _check_inputs(prompts, None if steps == 0 else data)
    from edgeprune.artefact.resolve import resolve
    from edgeprune.report import make  # noqa: F401  a missing package is refused before any work
    from edgeprune.stages import compress as stage_order

    images_set = options.given(
        num_inference_steps=inference_steps, guidance_scale=guidance_scale, height=height, width=width
    )
    begun = model is None and is_begun(out)
    ws = workspace(out, fresh=fresh, generation=None if dry_run else images_set) if begun else None
    start = stage_order.preset(preset, builtin=ws.builtin if ws else model is None)
    plan = options.plan_options(
        start.plan, method=method, keep=keep, max_memory=max_memory, fit=fit, protect_first=protect_first,
        protect_last=protect_last, threshold=threshold, blocks=blocks, components=components, group_size=group_size,
        modulation_rank=modulation_rank, prompts=prompts,
    )  # fmt: skip
    chosen = _merged(
        start, plan, steps=steps, data=data, metric=metric, prompts=prompts, weights=weights or [],
        group_size=group_size, calibration=calibration,
    )  # fmt: skip
    source = ws.source if ws else resolve(model)
    images = images_of(source, ws, images_set)
    if dry_run:
        return screen.show_forecast(stage_order.forecast(source, chosen, images), screen.FLOORS, as_json)
    if ws is None:
        stage_order.rehearse(source, images, chosen)  # before the folder is created
    ws = ws or workspace(out, model, fresh=fresh, begin=True, generation=images_set)
    if fit:
        screen.table(fit_rows(ws.fit(fit)))
    _run(ws, chosen, preset == "quick", as_json)


def _check_inputs(prompts: str | None, data: str | None) -> None:
    """Refuse files of prompts or data that cannot be used, before anything is computed.

    Raises:
        InputError: a file does not exist or cannot be used.
    """
    from edgeprune.data.settings import check_source

    check_prompts(prompts)
    if data:
        check_source(data)


def _merged(
    start: CompressOptions,
    plan: PlanOptions,
    *,
    steps: int | None,
    data: str | None,
    metric: str,
    prompts: str | None,
    weights: list[str],
    group_size: int,
    calibration: str,
) -> CompressOptions:
    """Return the preset's options with the user's on top."""
    from dataclasses import replace

    from edgeprune.metrics import parse_weights
    from edgeprune.stages.compress import as_published

    training = start.distill
    if steps is not None and training is not None:
        training = replace(training, steps=steps) if steps else None
    if training is not None:
        training = replace(training, int4_group_size=group_size)
    chosen = replace(
        start,
        analyze=replace(start.analyze, metric=metric, prompts=prompts, weights=parse_weights(weights)),
        plan=plan,
        data=replace(start.data, source=data or start.data.source),
        distill=training,
        quantize=replace(start.quantize, group_size=group_size, calibration=calibration),
    )
    return as_published(chosen)


def _run(ws: Workspace, chosen: CompressOptions, quick: bool, as_json: bool) -> None:
    """Run the stages and show what is left of the model."""
    from edgeprune.report import make
    from edgeprune.stages.compress import compress

    with screen.bars() as progress:
        ran = compress(ws, chosen, progress)
        too_little = make.lacking_memory(ws)
        summary = {} if too_little else make.make_report(ws, quick=quick, redo=bool(ran), progress=progress)
    rows = plan_rows(ws.plan(), chosen.plan.modulation_rank)
    screen.table([*rows, *(make.summary_rows(summary) if summary else [])])
    done = f"done: {', '.join(ran)}" if ran else "nothing to do, all stages are done"
    screen.say(f"{done}; {too_little or 'report: ' + str(ws.out / 'report.html')}")
    screen.say(f"next: edgeprune export {ws.out} --target onnx -o {ws.out}-onnx")
    if as_json:
        screen.print_json({"out": str(ws.out), "ran": ran, **summary})
