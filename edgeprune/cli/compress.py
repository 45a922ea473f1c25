"""`edgeprune compress`: all stages in one command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune import api
from edgeprune.api.folders import check_places, check_prompts, world_given
from edgeprune.cli import choices, limits, options, screen
from edgeprune.cli.distill import (
    Accumulate,
    Batch,
    DistillGuidance,
    Ema,
    GradientCheckpointing,
    MixedPrecision,
    Optimizer,
    Rounds,
    Train,
)
from edgeprune.cli.plan import fit_rows, plan_rows
from edgeprune.common.errors import InputError
from edgeprune.common.tables import parse_duration

if TYPE_CHECKING:
    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages.options import CompressOptions

EPILOG = "Example: edgeprune compress -o small  ·  edgeprune compress ./sd35 -o small --max-size 3.2GB"


Steps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Training steps; 0 skips distillation. The paper took 64,000, each of 64 samples.",
        show_default="the preset's",
        rich_help_panel=options.TRAINING,
    ),
]


TrainStates = Annotated[
    int | None,
    typer.Option(
        "--train-states", min=0, rich_help_panel=options.TRAINING,
        help="`distill --states`: train only what follows the frozen prefix, from so many cached states.",
        show_default="for large models a quarter of the samples trained on; 0 for small ones",
    ),
]  # fmt: skip


def compress(
    model: options.Model = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    out: options.Out = Path("compressed"),
    preset: Annotated[
        str, choices.choice(names=lambda: options.PRESETS, help="Where all other options start. quick is a first look.")
    ] = "default",
    dry_run: options.DryRun = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    keep: options.Keep = None,
    max_size: options.MaxSize = None,
    fit: options.FitTo = None,
    method: options.Method = None,
    modulation_rank: options.ModulationRank = None,
    protect_first: options.ProtectFirst = None,
    protect_last: options.ProtectLast = None,
    keep_components: options.KeepComponents = "",
    stand_in: options.StandIn = None,
    threshold: options.Threshold = None,
    blocks: options.Blocks = "",
    components: options.Components = "",
    steps: Steps = None,
    data: options.DataSource = None,
    train: Train = "all",
    train_states: TrainStates = None,
    rounds: Rounds = None,
    batch: Batch = None,
    ema: Ema = None,
    distill_guidance: DistillGuidance = None,
    mixed_precision: MixedPrecision = None,
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: GradientCheckpointing = False,
    accumulate: Accumulate = 1,
    metric: options.Metric = "velocity",
    weights: options.MetricWeights = None,
    prompts: options.Prompts = None,
    count: options.Count = None,
    states: options.States = None,
    estimator: options.Estimator = None,
    group_size: options.GroupSize = 64,
    calibration: options.Calibration = "auto",
    encoders: options.Encoders = None,
    no_half: options.NoHalf = False,
    calibration_count: Annotated[int | None, options.calibration_count("--calibration-count")] = None,
    inference_steps: options.InferenceSteps = None,
    guidance_scale: options.Guidance = None,
    solver: options.Solver = None,
    guidance_range: options.GuidanceRange = None,
    height: options.Height = None,
    width: options.Width = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    time: limits.Time = None,
) -> None:
    """Run all stages: analyze, plan, prune, distill, quantize, and a report.

    An interrupted run resumes when you run the same command again.
    """
    guided = options.noise_levels(guidance_range)
    check_places(out, model, revision)
    check_prompts(prompts)
    compute = limits.compute_options(device, memory, yes=yes)
    time_s = parse_duration(time, "--time") if time is not None else None
    start = api.preset(preset, world=world_given(out, model), data=data)
    plan = options.plan_options(
        start.plan, method=method, keep=keep, max_size=max_size, fit=fit, protect_first=protect_first,
        protect_last=protect_last, threshold=threshold, blocks=blocks, components=components, group_size=group_size,
        modulation_rank=modulation_rank, prompts=prompts, keep_components=keep_components,
        stand_in=stand_in,
    )  # fmt: skip
    chosen = _merged(
        start, plan, steps=steps, metric=metric, prompts=prompts, weights=weights or [],
        count=count, states=states, estimator=estimator, group_size=group_size, calibration=calibration,
        calibration_count=calibration_count, encoders=encoders,
        training={
            "states": train_states, "mixed_precision": mixed_precision,
            "gradient_checkpointing": gradient_checkpointing or None, "train": None if train == "all" else train,
            "guidance": distill_guidance, "optimizer": None if optimizer == "adamw" else optimizer,
            "rounds": rounds, "batch": batch, "ema": ema, "accumulate": None if accumulate == 1 else accumulate,
        },
    )  # fmt: skip
    generation = api.GenerationOptions(
        num_inference_steps=inference_steps, guidance_scale=guidance_scale, height=height, width=width,
        solver=solver, guidance_range=guided,
    )  # fmt: skip
    if dry_run:
        forecast = api.forecast_compress(
            model, out, chosen, revision=revision, variant=variant, generation=generation, compute=compute,
            time_s=time_s, quick=preset == "quick", no_half=no_half,
        )  # fmt: skip
        if forecast.choice:
            screen.say(forecast.described_choice())
        return screen.show_forecast(forecast.to_json(), screen.FLOORS, as_json)
    with screen.bars() as progress:
        done = api.compress(
            model, out, chosen, revision=revision, variant=variant, generation=generation,
            compute=compute, time_s=time_s, quick=preset == "quick", no_half=no_half, fresh=fresh,
            progress=progress if chosen.distill or steps is not None else _without_data(progress),
        )  # fmt: skip
    _show(done, as_json)


def _without_data(progress: Callable[..., None]) -> Callable[..., None]:
    """Return `progress` that first says that there is no training: at its first call the checks are over."""
    from edgeprune.stages.options import GIVE_DATA

    lines = [f"not distilled: {GIVE_DATA}"]

    def update(*args: Any, **options: Any) -> None:
        while lines:
            screen.say(lines.pop())
        progress(*args, **options)

    return update


def _merged(
    start: CompressOptions,
    plan: PlanOptions,
    *,
    steps: int | None,
    metric: str,
    prompts: str | None,
    weights: list[str],
    count: int | None,
    states: int | None,
    estimator: str | None,
    group_size: int,
    calibration: str,
    calibration_count: int | None,
    encoders: str | None,
    training: dict[str, Any],
) -> CompressOptions:
    """Return the preset's options with the user's on top."""
    from edgeprune.metrics import parse_weights
    from edgeprune.stages.options import GIVE_DATA

    distill, wanted = start.distill, options.given(**training)
    if steps and distill is None:
        raise InputError(f"--steps {steps}: there is no data to train on; {GIVE_DATA}")
    if steps is not None and distill is not None:
        distill = replace(distill, steps=steps) if steps else None
    accumulate = wanted.pop("accumulate", 1) if distill is not None else 1
    if distill is not None:
        distill = replace(distill, int4_group_size=group_size, **wanted)
    elif wanted:
        names = {"states": "train-states", "guidance": "distill-guidance"}
        option = next(names.get(name, name) for name in wanted).replace("_", "-")
        raise InputError(f"--{option}: nothing is trained; {'omit it' if steps == 0 else GIVE_DATA}")
    return replace(
        start,
        analyze=replace(
            start.analyze,
            metric=metric,
            prompts=prompts,
            weights=parse_weights(weights),
            states=states,
            **options.given(count=count, estimator=estimator),
        ),
        plan=plan,
        distill=distill,
        placement=api.Placement(accumulate=accumulate),
        encoders=encoders,
        quantize=replace(
            start.quantize,
            group_size=group_size,
            calibration=calibration,
            count=calibration_count,
            states=None if calibration == "none" else states,
        ),
    )


def _show(done: api.Compressed, as_json: bool) -> None:
    """Show what is left of the model."""
    from edgeprune.report import make

    asked = done.options.plan
    shown = plan_rows(done.plan, asked.modulation_rank, done.removable, asked.stand_in, done.resident_bytes)
    rows = [*fit_rows(done.fit), *shown]
    rows.append(("distillation", done.distillation))
    screen.table([*rows, *(make.summary_rows(done.report.to_json()) if done.report else [])])
    ran = f"done: {', '.join(done.ran)}" if done.ran else "nothing to do, all stages are done"
    screen.say(f"{ran}; {done.no_report or 'report: ' + str(done.out / 'report.html')}")
    screen.say(f"next: edgeprune export {screen.quoted(done.out)} --target onnx -o {screen.quoted(done.out, '-onnx')}")
    if as_json:
        screen.print_json(done.to_json())
