"""`edgeprune synth`: a full-size pipeline with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import check_out
from edgeprune.cli import choices, screen

EPILOG = "Example: edgeprune synth sd3.5-large -o large"


def architectures() -> Iterable[str]:
    """Return the names of the published architectures."""
    from edgeprune.common.files import read_json

    return list(read_json(Path(__file__).parents[1] / "families" / "architectures.json"))


def synth(
    name: Annotated[str, choices.choice_argument(names=architectures, metavar="NAME", help="Model to imitate.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Pipeline folder to write.")] = Path("synth"),
) -> None:
    """Write a full-size pipeline with random weights, for measuring memory and time.

    An interrupted run resumes when you run the same command again.
    """
    from edgeprune.artefact.synth import synth as make

    check_out(out)
    with screen.bars() as progress:
        size = make(name, out, progress=progress)
    screen.say(f"{out}: {name} with random weights, {size / 1e9:,.1f} GB")
    screen.say(f"next: edgeprune compress {out} -o small --method manual --steps 0")
