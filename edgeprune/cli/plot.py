"""`edgeprune plot`: figures of an analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import check_out
from edgeprune.cli import screen

EPILOG = "Example: edgeprune plot small/analysis.json -o plots"


def plot(
    report: Annotated[
        Path, typer.Argument(metavar="FILE", help="analysis.json of `edgeprune analyze`, or published scores.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")] = Path("plots"),
) -> None:
    """Draw the contributions with 95 % intervals, as SVG and PNG.

    There is a figure of blocks and components, and one of joint removals if the report has them.
    """
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.analysis.plots import save

    check_out(out)
    for path in save(ContributionReport.load(report), out):
        screen.say(f"wrote {path}")
