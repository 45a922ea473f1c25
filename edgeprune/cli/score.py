"""`edgeprune score`: images by any metric."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune import api
from edgeprune.cli import choices, limits, options, screen

EPILOG = (
    "Example: edgeprune score small --against built-in --metric shapes  ·  "
    "edgeprune score images --against ./sd35 --metric psnr --metric clip --weights clip=./clip  ·  "
    "edgeprune score small-onnx --metric geneval --weights geneval=./mask2former --weights clip=./clip -o scored  ·  "
    "edgeprune score ./sana-sprint --metric clip --weights clip=./clip -o sana"
)


def _of_reference(help: str, *, min: int) -> Any:
    """Return an option about another architecture that is drawn."""
    return typer.Option(
        min=min, help=help, show_default="its own", rich_help_panel="Another architecture (docs/references.md)"
    )


Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Original to compare with: a model folder, a hub id, built-in, or images of the same prompts.",
    ),
]


def score(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Model to draw with, or folder of images with metadata.jsonl.")
    ],
    metric: Annotated[
        list[str],
        choices.choice(
            names=choices.image_metrics,
            help="How images are scored. psnr, ssim and lpips need --against. Repeat the option for several metrics.",
        ),
    ],
    against: Against = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    weights: Annotated[list[str] | None, options.weights_of_metrics()] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text file with one prompt per line.",
            show_default="the metric's own prompts, else 100 held-out captions of edgeprune",
        ),
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="geneval, shapes: number of prompts of each task.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    runtime: options.RuntimeName = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of an image.", show_default="the model's own")
    ] = None,
    height: Annotated[int | None, _of_reference("Height of its images in pixels.", min=1)] = None,
    width: Annotated[int | None, _of_reference("Width of its images in pixels.", min=1)] = None,
    guidance_scale: Annotated[float | None, _of_reference("How closely its images follow the prompt.", min=0)] = None,
    device: limits.TorchDevice = "auto",
    memory: limits.Memory = None,
    yes: limits.TorchYes = False,
    longest: limits.TorchTime = None,
    option: limits.RuntimeOptions = None,
    exact: limits.Exact = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Keep the images here. An interrupted run resumes with them."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Score images by any metric, with 95 % intervals.

    With --against it also shows what was lost, in pairs of images of the same prompt.
    """
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    from edgeprune.metrics import parse_weights, scoring

    with screen.bars() as progress:
        done = api.score(
            folder, metric, against=against, revision=revision, variant=variant,
            weights=parse_weights(weights or []), prompts=prompts, per_task=per_task, seeds=seeds, runtime=runtime,
            steps=steps, height=height, width=width, guidance_scale=guidance_scale, device=device,
            memory=compute.memory, longest_s=compute.longest_s,
            options=limits.runtime_options(option), exact=exact, out=out, progress=progress,
        )  # fmt: skip
    screen.table(scoring.rows(done.scores))
    count, texts = done.scores[0].images, len(done.scores[0].prompts)
    intervals = "95 % bootstrap intervals over prompts" if texts > 1 else "no interval"
    screen.say(f"{count} images of {texts} prompt{'s' if texts > 1 else ''}; {intervals}")
    if out:
        screen.say(f"the images are in {out}")
    if not against:
        screen.say(
            f"next: edgeprune score {screen.quoted(folder)} --against ORIGINAL --metric {metric[0]} shows what was lost"
        )
    elif not out and done.drawn:
        screen.say("next: the same command with -o DIR keeps the images, so that they can be scored again")
    if as_json:
        screen.print_json(done.to_json())
