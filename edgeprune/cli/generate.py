"""`edgeprune generate`: one image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import limits, options, screen
from edgeprune.common.errors import InputError

EPILOG = (
    'Example: edgeprune generate "two red circles" --model small-onnx -o out.png  ·  '
    'edgeprune generate "two red circles" --model small --device cuda:1 -o out.png'
)
_OWN = "the model's own"


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="Exported folder, artefact folder or diffusers folder.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Image to write: .png, .jpg or .webp.")
    ] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps.", show_default=_OWN, rich_help_panel=options.IMAGES),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale.", show_default=_OWN, rich_help_panel=options.IMAGES)
    ] = None,
    solver: options.Solver = None,
    guidance_range: options.GuidanceRange = None,
    negative_prompt: Annotated[
        str,
        typer.Option(
            metavar="PROMPT", help="What not to draw. Needs guidance.", show_default="none",
            rich_help_panel=options.IMAGES,
        ),
    ] = "",
    height: Annotated[
        int | None, typer.Option(help="Height in pixels.", show_default=_OWN, rich_help_panel=options.IMAGES)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels.", show_default=_OWN, rich_help_panel=options.IMAGES)
    ] = None,
    runtime: options.RuntimeName = None,
    as_json: options.AsJson = False,
    device: limits.TorchDevice = "auto",
    memory: limits.Memory = None,
    yes: limits.TorchYes = False,
    longest: limits.TorchTime = None,
    keep_embeddings: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep encoded prompts here: each is encoded once, for all folders."),
    ] = None,
    option: limits.RuntimeOptions = None,
    exact: limits.Exact = False,
) -> None:  # fmt: skip
    """Draw one image with the runtime that fits the folder."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"-o {out}: expected a name ending in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: no such folder {out.parent}")
    guided = options.noise_levels(guidance_range)
    generation = api.GenerationOptions(
        num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        solver=solver, guidance_range=guided,
    )  # fmt: skip
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    with screen.bars() as progress:
        drawn = api.generate(
            model, prompt, negative_prompt=negative_prompt, seed=seed, generation=generation, runtime=runtime,
            device=device, memory=compute.memory, options=limits.runtime_options(option), exact=exact,
            keep_embeddings=keep_embeddings, longest_s=compute.longest_s, progress=progress,
        )  # fmt: skip
    drawn.image.save(out)
    where = f"{drawn.runtime} on {drawn.provider} in {drawn.precision} ({drawn.provider_why})"
    screen.say(f"{out}: {drawn.image.width}x{drawn.image.height}, seed {seed}; {where}")
    if as_json:
        screen.print_json({"out": str(out), **drawn.to_json()})
