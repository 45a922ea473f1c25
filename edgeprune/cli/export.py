"""`edgeprune export`: the files that a device runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import choices, options, screen

EPILOG = "Example: edgeprune export small --target onnx -o small-onnx"


def formats() -> Iterable[str]:
    """Return the formats that can be written."""
    from edgeprune.export import FORMATS

    return FORMATS


def forms() -> Iterable[str]:
    """Return where the modulation can be."""
    from edgeprune.export import APART, INSIDE

    return APART, INSIDE


def export(
    artefact: Annotated[Path, typer.Argument(metavar="MODEL", help="Artefact folder or diffusers folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    target: Annotated[str, choices.choice(names=formats, help="Format to write.")] = "onnx",
    device: Annotated[
        str | None,
        choices.choice(
            names=choices.devices, show_default="the usual one of the format",
            help="Device to export for; it sets precision, sizes and limits. See `edgeprune targets`.",
        ),
    ] = None,
    modulation: Annotated[
        str | None,
        choices.choice(
            names=forms, show_default="apart; inside for coreml",
            help="Modulation in a network of its own, which is freed before the first step, or inside the transformer, "
            "as optimum and OpenVINO GenAI need it.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Write the files that a device runs, from the checkpoint's own integers.

    The export fails if it does not compute the same as the checkpoint. If it is interrupted or the disk is full, it
    leaves OUT.partial, and the same command resumes from there.
    """
    with screen.bars() as progress:
        done = api.export(artefact, out, target, device=device, modulation=modulation, progress=progress)
    screen.say("parity holds: the export computes the same as the checkpoint")
    model = screen.quoted(out)
    screen.say(f'next: edgeprune generate "two red circles" --model {model} -o out.png, or: edgeprune bench {model}')
    if as_json:
        screen.print_json(done.to_json())
