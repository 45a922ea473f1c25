"""`edgeprune report`: the page of an artefact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import check_begun, open_folder
from edgeprune.cli import limits, options, screen

EPILOG = "Example: edgeprune report -o small --bench bench.json"


def report(
    out: options.BegunFolder = Path("compressed"),
    bench_file: Annotated[
        Path | None,
        typer.Option("--bench", metavar="FILE", help="JSON of `edgeprune bench` to show in the page."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images of each model to draw; not of teachers of shapes world.",
            show_default="those drawn before, else 8",
        ),
    ] = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:
    """Write report.html again, with the figures of a benchmark if you give one."""
    check_begun(out)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    from edgeprune.bench import results
    from edgeprune.report import make

    measured = results.load(bench_file) if bench_file else None
    ws = open_folder(out, compute=compute)
    with screen.bars() as progress:
        make.make_report(ws, images=images, bench=measured, progress=progress)
    screen.say(f"wrote {out / 'report.html'}")
