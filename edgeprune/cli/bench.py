"""`edgeprune bench`: memory, latency and quality of what runs here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import choices, limits, options, screen

EPILOG = (
    'Example: edgeprune bench small-onnx --assert "peak_ratio<=0.9"  ·  edgeprune bench small-* --runtime all  ·  '
    "edgeprune bench small-onnx --reference ./sana-sprint"
)


def runtimes_or_all() -> Iterable[str]:
    """Return the names of the runtimes, and `all`."""
    return (*choices.runtimes(), "all")


def bench(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Exported folders or artefact folders.")],
    runtime: Annotated[
        str | None,
        choices.choice(
            names=runtimes_or_all, show_default="the first installed one that fits",
            help="Runtime to measure; all measures every runtime that opens a folder and can run here.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Original to compare with: folder or hub id.",
            show_default="the model that the first folder was made from",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also measure another architecture: any text-to-image folder of diffusers (docs/references.md).",
        ),
    ] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of warm steps to time.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of an image.", show_default="the model's own")
    ] = None,
    quality: Annotated[
        int, typer.Option(min=0, help="Shapes-world prompts per task to score images on; 0 scores none.")
    ] = 0,
    no_original: Annotated[
        bool, typer.Option("--no-original", help="Leave out the original; ratios refer to the first folder.")
    ] = False,
    way: Annotated[
        bool,
        typer.Option(
            "--way",
            help="Show the way: a row per change, each on top of those before it. Takes an artefact folder, an export, "
            "or one of each.",
        ),
    ] = False,
    device: limits.TorchDevice = "auto",
    memory: limits.Memory = None,
    yes: limits.TorchYes = False,
    longest: limits.TorchTime = None,
    option: limits.RuntimeOptions = None,
    exact: limits.Exact = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file, as JSON.")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--assert", metavar="EXPRESSION",
            help="Condition such as 'peak_ratio<=0.25'; exit code 1 if it does not hold. Repeat the option for "
            "several conditions.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Measure memory, latency and quality next to the original, in bf16 or float32, whichever is faster here.

    Each variant runs in a fresh process.
    """
    from rich.console import Console

    from edgeprune.bench import assertions, tables
    from edgeprune.common.files import write_json

    for expression in check or []:
        assertions.parse_expression(expression)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    result = api.bench(
        folders, runtime=runtime, baseline=baseline, reference=reference, revision=revision, variant=variant,
        repeats=repeats, steps=steps, quality=quality, original=not no_original, way=way, device=device,
        memory=compute.memory, longest_s=compute.longest_s, options=limits.runtime_options(option), exact=exact,
        progress=lambda what, *_: screen.say(what),
    )  # fmt: skip
    if way:
        screen.table(tables.way_rows(result))
        screen.say("each row is on top of those before it; ratios, drops and PSNR against the original")
    else:
        Console().print(tables.table(result))
    if json_file:
        write_json(json_file, result.to_json())
        screen.say(f"wrote {json_file}")
    assertions.assert_expressions(result, check or [])
