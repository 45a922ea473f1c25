"""`edgeprune cache`: training data, encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.api.folders import check_original, check_out, images_of
from edgeprune.cli import limits, options, screen
from edgeprune.common import heap
from edgeprune.common.errors import InputError

EPILOG = (
    "Example: edgeprune cache images/ --model ./sd35 -o encoded --buckets  ·  "
    "edgeprune cache datasets:me/pictures --model ./sd35 --samples 100000 --dry-run  ·  "
    "edgeprune cache prompts.txt --model ./sd35 -o drawn --memory 8GB --yes"
)


Workers = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Threads that decode and resize images.", show_default="one per core, at most 8"),
]


def _refused(value: str | None) -> None:
    """Say where the states of a training are made, which depend on more than the model and the data."""
    if value is not None:
        raise InputError(
            "--states: states depend on the plan and on how it is trained, so `edgeprune distill -o DIR --states N "
            "--only-states` makes them"
        )


def cache(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An imagefolder, images with .txt files, .tar shards, YE-POP, datasets:NAME, a text file of prompts, "
            "'captions' or 'shapes'.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="Diffusers folder or hub id.", show_default="the built-in model"
        ),
    ] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to create, or to resume if it exists.")
    ] = Path("cache"),
    samples: Annotated[
        int,
        typer.Option(min=1, help="Number of images to draw (captions, prompts, shapes) or to take (datasets:NAME)."),
    ] = 1024,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets", help="Choose sizes by aspect ratio. Without it all images are cropped to --height x --width."
        ),
    ] = False,
    states: Annotated[
        str | None,
        typer.Option("--states", hidden=True, is_eager=True, callback=_refused, help="An option of `distill`."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store numbers in 16 bits: half the disk space.")] = False,
    workers: Workers = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    inference_steps: options.InferenceSteps = None,
    guidance_scale: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:  # fmt: skip
    """Encode images and captions once, for `distill --data`.

    An interrupted run resumes after the last complete shard.
    """
    check_out(out)
    check_original(model, revision)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    heap.large_pages()
    from edgeprune.artefact.checks import check_pipeline
    from edgeprune.artefact.resolve import resolve
    from edgeprune.common.lock import LOCK, hold
    from edgeprune.data import encode
    from edgeprune.data.settings import WORKERS, CacheOptions, check_source, forecast
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.stages.caching import Caching

    check_source(source, "SOURCE")
    folder = resolve(model, revision, variant)
    check_pipeline(folder, variant)
    images = images_of(
        folder,
        None,
        GenerationOptions(
            num_inference_steps=inference_steps, guidance_scale=guidance_scale, height=height, width=width
        ),
    )
    chosen = CacheOptions(source=source, samples=samples, buckets=buckets, half=half)
    encode.check_folder(out, source)
    caching = Caching(folder, images, chosen, out, compute, variant)
    if dry_run:
        expected = forecast(folder, images, chosen, out)
        screen.table(_megabytes(expected))
        screen.say("upper bounds: unusable images take no space, and equal captions are stored once per shard")
        if as_json:
            screen.print_json(expected)
        return
    with screen.bars() as progress:
        caching.check(progress)
        with hold(out / LOCK, out):
            made = caching.make(progress, workers=workers or WORKERS)
    _show(encode.summary(made), encode.skip_report(out), out, bool(made.samples), as_json)


def _show(summary: dict[str, Any], report: str, out: Path, worked: bool, as_json: bool) -> None:
    """Show what the folder holds."""
    sizes = ", ".join(f"{size}: {count:,}" for size, count in summary["sizes"].items())
    rows = _megabytes({k: v for k, v in summary.items() if k != "sizes"})
    screen.table([*rows, ("samples by size", sizes)])
    if not worked:
        screen.say("nothing to do, the cache is complete")
    screen.say(report)
    screen.say(f"next: edgeprune distill -o small --data {screen.quoted(out)}")
    if as_json:
        screen.print_json({"out": str(out), **summary})


def _megabytes(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows in megabytes; unknown numbers are left out."""
    rows = []
    for key, value in numbers.items():
        if key.endswith("_bytes_per_s"):
            rows.append((key.removesuffix("_bytes_per_s").replace("_", " "), f"{value / 1e6:,.2f} MB/s"))
        elif key.endswith("_bytes") and value is not None:
            rows.append((key.removesuffix("_bytes").replace("_", " "), f"{value / 1e6:,.3f} MB"))
        elif value is not None:
            rows.append((key.replace("_per_s", "/s").replace("_", " "), f"{value:,}"))
    return rows
