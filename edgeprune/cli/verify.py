"""`edgeprune verify`: whether a model computes here what its files say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune import api
from edgeprune.api.folders import check_original
from edgeprune.cli import choices, limits, options, screen

if TYPE_CHECKING:
    from edgeprune.verify.finding import Finding

EPILOG = (
    "Example: edgeprune verify ./sd3.5-large --memory 8GB  ·  edgeprune verify small --dtype bf16 --json  ·  "
    "edgeprune verify owner/name --variant fp16 --height 512 --width 512"
)
HEADER = ("verdict", "check", "part", "computes in", "measure", "found", "bound")
DTYPES = ("fp32", "bf16", "fp16")
"""Repeated here, since its registry imports torch; tests/cli/test_choices.py compares the two."""


def dtypes() -> Iterable[str]:
    """Return what networks can compute in."""
    return DTYPES


def verify(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Diffusers folder, artefact folder or hub id.", show_default="the built-in model"
        ),
    ] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    height: Annotated[
        int | None, typer.Option(min=8, help="Height of the image in pixels.", show_default="the model's own")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Width of the image in pixels.", show_default="the model's own")
    ] = None,
    dtype: Annotated[
        str | None,
        choices.choice(
            names=dtypes, show_default="what they compute in on this machine",
            help="What text encoders and transformer compute in.",
        ),
    ] = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Check that a model computes on this machine what its files say.

    One step of sampling is compared with diffusers' own, each text encoder with float32, the VAE with a picture that it
    encodes and decodes, activations with float16's range, and an artefact's files with their hashes. Large models are
    read block by block. The exit code is 1 if a check fails.
    """
    check_original(model, revision)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    generation = api.GenerationOptions(height=height, width=width)
    with screen.bars() as progress:
        done = api.verify(
            model, revision=revision, variant=variant, dtype=dtype, generation=generation, compute=compute,
            progress=progress,
        )  # fmt: skip
    screen.table([HEADER, *map(_row, done.findings)])
    for finding in done.findings:
        if finding.verdict != "pass":
            screen.say(f"{' '.join(filter(None, (finding.verdict, finding.check, finding.part)))}: {finding.advice}")
    failed = sorted({f.check for f in done.findings if f.verdict == "fail"})
    screen.say(f"failed: {', '.join(failed)}" if failed else f"passed at {done.width}x{done.height} on {done.device}")
    if as_json:
        screen.print_json(done.to_json())
    if not done.passed:
        raise typer.Exit(1)


def _row(finding: Finding) -> tuple[str, ...]:
    figure = "" if not finding.measure else "not finite" if finding.figure is None else f"{finding.figure:.3g}"
    bound = "" if finding.bound is None else f"{finding.bound:.5g}"
    return finding.verdict, finding.check, finding.part, finding.dtype or "", finding.measure, figure, bound
