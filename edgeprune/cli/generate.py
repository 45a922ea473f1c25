"""`edgeprune generate`: one image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import choices, options, screen
from edgeprune.common.errors import InputError

EPILOG = 'Example: edgeprune generate "two red circles" --model small-onnx -o out.png'
_OWN = "the model's own"


def providers() -> Iterable[str]:
    """Return the names of ONNX Runtime's execution providers."""
    from edgeprune.runtimes.providers import PROVIDERS

    return PROVIDERS


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
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Load the networks of one stage at a time.")
    ] = False,
    provider: Annotated[
        str | None,
        choices.choice(
            names=providers, show_default="the first one here", help="ort: execution provider of ONNX Runtime."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="ort, openvino: keep prepared weights here, for a faster next start."),
    ] = None,
) -> None:  # fmt: skip
    """Draw one image with the runtime that fits the folder."""
    from edgeprune import runtimes
    from edgeprune.runtimes.base import check_size, read_settings

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"-o {out}: expected a name ending in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: no such folder {out.parent}")
    load_options = {"low_memory": low_memory, "provider": provider, "cache_dir": cache_dir}
    load_options = {name: value for name, value in load_options.items() if value}
    runtime = runtime or ("ort" if provider else None)  # only ONNX Runtime has providers
    chosen = runtimes.choose(model, runtime)
    screen.say_conflicts(chosen)
    runtimes.RUNTIMES[chosen].require()
    settings = read_settings(model)  # refuses a bad size before gigabytes are loaded
    defaults = settings.generation
    sides = defaults.height if height is None else height, defaults.width if width is None else width
    check_size(settings, *sides, where="" if height is None and width is None else "--")
    with runtimes.load(model, runtime, **load_options) as opened, screen.bars() as progress:
        image = opened.generate(
            prompt, negative_prompt=negative_prompt, steps=steps, guidance_scale=guidance_scale,
            height=height, width=width, seed=seed, progress=lambda done, total: progress("generate", done, total, ""),
        )[0]  # fmt: skip
    image.save(out)
    where = f"{opened.name} on {opened.backend.provider} ({opened.backend.why})"
    screen.say(f"{out}: {image.width}x{image.height}, seed {seed}; {where}")
