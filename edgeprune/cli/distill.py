"""`edgeprune distill`: train the shorter transformer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.api.folders import check_begun, world_given
from edgeprune.cli import choices, limits, options, screen
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.training.trained import rank_of

EPILOG = "Example: edgeprune distill -o small --data images/ --steps 2000 --rate 1e-4"

Samples = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of images to draw if the data is captions, prompts or shapes.",
        show_default="1024; 6000 for teachers of shapes world", rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Training steps. The paper took 64,000.",
        show_default="1000; 400 for teachers of shapes world",
        rich_help_panel=options.TRAINING,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Samples per step, over all processes. The paper took 64.", show_default="32",
        rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
Rate = Annotated[
    float | None,
    typer.Option(
        help="Learning rate of AdamW.",
        show_default="1e-4; 5e-4 for teachers of shapes world",
        rich_help_panel=options.TRAINING,
    ),
]
Schedule = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.SCHEDULES, help="How the learning rate changes over the run.",
        show_default="constant; cosine for teachers of shapes world", rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
Optimizer = Annotated[
    str,
    choices.choice(
        names=lambda: options.OPTIMIZERS, rich_help_panel=limits.MEMORY,
        help="AdamW, or the same with moments of a byte each, by bitsandbytes: 10 bytes a parameter instead of 16.",
    ),
]  # fmt: skip
Ema = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Decay of the averaged weights, which are the result.",
        show_default="0.99; 0.98 for teachers of shapes world", rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Seed of all random draws.", rich_help_panel=options.TRAINING)]
QuantizeAware = Annotated[
    bool,
    typer.Option(
        "--quantize-aware/--no-quantize-aware", help="Train with weights rounded to INT4.",
        rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
GroupSize = Annotated[
    int,
    choices.choice(
        names=choices.group_sizes, convert=int, help="Number of weights that share one INT4 scale.",
        rich_help_panel=options.TRAINING,
    ),
]  # fmt: skip
MixedPrecision = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.MIXED_PRECISIONS, help="Number format of the student's computation.",
        show_default="accelerate's config; else bf16 for a large model where the device multiplies that, else no",
        rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Recompute activations in the backward pass: less memory, more time.",
        rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
Accumulate = Annotated[
    int,
    typer.Option(
        min=1, help="Compute a process's share of the batch in this many portions, one after the other.",
        rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
TeacherPrecision = Annotated[
    str,
    choices.choice(
        names=lambda: options.TEACHER_PRECISIONS, help="Number format of the teacher's weights.",
        rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
TeacherOffload = Annotated[
    bool,
    typer.Option(
        "--teacher-offload", help="Keep the teacher's weights on the CPU and move a layer to the device when it runs.",
        rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
EmaOffload = Annotated[
    bool,
    typer.Option(
        "--ema-offload", help="Keep the averaged weights on the CPU.", rich_help_panel=limits.MEMORY,
    ),
]  # fmt: skip
Sensitivity = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.SENSITIVITIES, refused={"binary": options.BINARY}, rich_help_panel=options.RECIPE,
        help="SGDistill: graded lowers a part's learning rate, the more it contributes; off trains all parts alike.",
        show_default="graded where the plan removes components, else off; off for baselines",
    ),
]  # fmt: skip
FreezePrefix = Annotated[
    bool | None,
    typer.Option(
        "--freeze-prefix/--no-freeze-prefix", help="PWP: freeze everything before the first pruned block.",
        show_default="freeze; not for baselines", rich_help_panel=options.RECIPE,
    ),
]  # fmt: skip
LambdaOutput = Annotated[
    float | None,
    typer.Option(
        min=0, help="Weight of the error to the teacher's velocity.",
        show_default="1", rich_help_panel=options.RECIPE,
    ),
]  # fmt: skip
LambdaFeature = Annotated[
    float | None,
    typer.Option(
        min=0, help="Weight of the error to the teacher's features.",
        show_default="1e-4; 1 for baselines", rich_help_panel=options.RECIPE,
    ),
]  # fmt: skip
LambdaTask = Annotated[
    float | None,
    typer.Option(
        min=0, help="Weight of the error to the data's own velocity.",
        show_default="0; 1 for baselines", rich_help_panel=options.RECIPE,
    ),
]  # fmt: skip
FeaturesOf = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.FEATURES, rich_help_panel=options.RECIPE,
        help="Outputs that --lambda-feature compares: those of blocks, or of their attention.",
        show_default="blocks; attention for koala",
    ),
]  # fmt: skip
Levels = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.LEVELS, rich_help_panel=options.RECIPE,
        help="Noise levels trained at: shifted as the scheduler does; steps, half of them exactly those that the model "
        "is sampled at; or uniform.",
        show_default="steps for models sampled in at most 8 steps, else shifted",
    ),
]  # fmt: skip
DropCaptions = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Share of samples trained with the empty prompt.",
        show_default="0.1 for models that are guided, else 0", rich_help_panel=options.RECIPE,
    ),
]  # fmt: skip


def _checked_train(value: str) -> str:
    """Refuse what cannot be trained before torch is imported."""
    rank_of(value)
    return value


Train = Annotated[
    str,
    typer.Option(
        metavar="all|lora:R", callback=_checked_train, rich_help_panel=options.TRAINING,
        help="What is trained: all weights, or additions to them of rank R by peft, which takes far less memory. They "
        "are added to the weights at the end.",
    ),
]  # fmt: skip
States = Annotated[
    int | None,
    typer.Option(
        min=0, rich_help_panel=options.TRAINING,
        help="Train only what follows the frozen prefix, from so many cached states; 0 runs both models in every step.",
        show_default="for large models a quarter of the samples trained on; 0 for small ones",
    ),
]  # fmt: skip
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1, rich_help_panel=options.TRAINING,
        help="Divide the training into so many rounds, each of which makes new states. Those of one are on the disk.",
        show_default="1; with the default of --states as many as keep a round at 2,048",
    ),
]  # fmt: skip
PrefixCalibration = Annotated[
    str | None,
    choices.choice(
        names=lambda: options.PREFIX_CALIBRATIONS, rich_help_panel=options.TRAINING,
        help="How the INT4 integers of the frozen prefix are chosen, before states are made through it.",
        show_default="none",
    ),
]  # fmt: skip


DistillGuidance = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE", rich_help_panel=options.TRAINING,
        help="Learn the velocity that is guided at this scale, above 1. A step of the result is one evaluation.",
        show_default="learn the velocity with the prompt alone",
    ),
]  # fmt: skip


def distill(
    out: options.BegunFolder = Path("compressed"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the memory that each process needs, and stop.")
    ] = False,
    only_states: Annotated[
        bool,
        typer.Option(
            "--only-states",
            help="Make the states of the first round and stop. The same command without it finds them.",
        ),
    ] = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    data: options.DataSource = None,
    samples: Samples = None,
    steps: Steps = None,
    batch: Batch = None,
    rate: Rate = None,
    schedule: Schedule = None,
    optimizer: Optimizer = "adamw",
    ema: Ema = None,
    seed: Seed = 0,
    train: Train = "all",
    states: States = None,
    rounds: Rounds = None,
    prefix_calibration: PrefixCalibration = None,
    quantize_aware: QuantizeAware = True,
    group_size: GroupSize = 64,
    mixed_precision: MixedPrecision = None,
    gradient_checkpointing: GradientCheckpointing = False,
    accumulate: Accumulate = 1,
    teacher_precision: TeacherPrecision = "float32",
    teacher_offload: TeacherOffload = False,
    ema_offload: EmaOffload = False,
    config: limits.LaunchConfig = None,
    sensitivity: Sensitivity = None,
    freeze_prefix: FreezePrefix = None,
    lambda_output: LambdaOutput = None,
    lambda_feature: LambdaFeature = None,
    lambda_task: LambdaTask = None,
    features: FeaturesOf = None,
    levels: Levels = None,
    drop_captions: DropCaptions = None,
    distill_guidance: DistillGuidance = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:
    """Train the shorter transformer to reproduce the original.

    Options of the recipe that are not given follow from the plan's method and the model; the run prints them.
    An interrupted run resumes from its last saved state when you run the same command again.
    """
    if config and not processes.launched() and not dry_run:
        from edgeprune.training.launch import launch

        return launch(config, sys.argv[1:])
    if data:
        from edgeprune.data.settings import check_source

        check_source(data)
    if only_states and fresh:
        raise InputError("--fresh: nothing is trained with --only-states, and states that fit are kept; omit one")
    if ema_offload and ema == 0:
        raise InputError("--ema-offload: found --ema 0, which keeps no averaged weights; omit one")
    check_begun(out)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    from dataclasses import replace

    base = api.preset("default", world=world_given(out), data=data)
    chosen = replace(
        base.distill or api.DistillOptions(),
        **options.given(steps=steps, batch=batch, rate=rate, schedule=schedule, ema=ema),
        sensitivity=sensitivity, freeze_prefix=freeze_prefix, features=features,
        lambda_task=lambda_task, lambda_output=lambda_output, lambda_feature=lambda_feature,
        levels=levels, drop_captions=drop_captions,
        mixed_precision=mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"),
        teacher_precision=teacher_precision, gradient_checkpointing=gradient_checkpointing,
        int4_group_size=group_size if quantize_aware else None, seed=seed, states=states, rounds=rounds,
        prefix_calibration=prefix_calibration, train=train, guidance=distill_guidance, optimizer=optimizer,
    )  # fmt: skip
    placement = api.Placement(accumulate=accumulate, teacher_offload=teacher_offload, ema_offload=ema_offload)
    if dry_run:
        numbers = api.forecast_distill(out, chosen, placement=placement, config=config, compute=compute).to_json()
        remark = "of one process, on its device; kernels, communication and the allocator need more"
        return screen.show_forecast(numbers, remark, as_json)
    source = api.DataOptions(source=base.data.source, samples=samples or base.data.samples)
    if only_states:
        with screen.bars() as progress:
            made = api.make_states(out, chosen, source, compute=compute, progress=progress)
        screen.say(f"{made.folder}: {made.states} states, {made.bytes / 1e6:,.1f} MB")
        screen.say("next: the same command without --only-states")
        return screen.print_json(made.to_json()) if as_json else None
    with screen.bars() as progress:
        done = api.distill(out, chosen, source, placement=placement, compute=compute, fresh=fresh, progress=progress)
    screen.say(f"loss {done.first_loss:.4f} -> {done.last_loss:.4f}" + ("" if done.ran else " (already done)"))
    screen.say(f"next: edgeprune quantize -o {screen.quoted(out)}")
    if as_json:
        screen.print_json(done.to_json())
