"""`edgeprune synth`: a full-size pipeline with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import check_out
from edgeprune.cli import choices, screen

EPILOG = "Example: edgeprune synth sd3.5-large -o large"


def pipelines() -> Iterable[str]:
    """Return the names of the published pipelines."""
    from edgeprune.families import published

    return list(published.pipelines())


def synth(
    name: Annotated[str, choices.choice_argument(names=pipelines, metavar="NAME", help="Model to imitate.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Pipeline folder to write.")] = Path("synth"),
    tiny_encoders: Annotated[
        bool,
        typer.Option(
            "--tiny-encoders", help="Make text encoders, VAE and tokenizers tiny; only the transformer has real size."
        ),
    ] = False,
) -> None:
    """Write a whole pipeline at its real size with random weights, for measuring memory and time.

    It takes 28 GB of disk for sd3.5-large. An interrupted run resumes when you run the same command again.
    """
    from edgeprune.artefact.synth import synth as make

    check_out(out)
    with screen.bars() as progress:
        size = make(name, out, tiny_encoders=tiny_encoders, progress=progress)
    screen.say(f"{out}: {name} with random weights, {size / 1e9:,.1f} GB")
    screen.say(f"next: edgeprune compress {screen.quoted(out)} -o small --method manual --steps 0")
