"""`edgeprune convert`: a diffusers folder from a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import options, screen

EPILOG = (
    "Example: edgeprune convert flux1-dev.safetensors -o flux1-dev --config black-forest-labs/FLUX.1-dev  ·  "
    "edgeprune convert flux1-dev-Q4_K_S.gguf -o flux1-dev --config ./FLUX.1-dev"
)


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A .safetensors or .gguf file, or a folder with weights in 8 bits."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Diffusers folder to create.")],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Hub id or diffusers folder of the same model, for configs, tokenizers and the parts that the file "
            "does not have.",
            show_default="FILE itself if it is a whole pipeline",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of that hub id.", show_default="its default branch"),
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a diffusers folder from a single file.

    Files of FLUX.1, SD3 and SD3.5 are read in the layouts of their authors, ComfyUI and diffusers, in float8 and GGUF
    too. Every tensor is used, not needed by a rule, or refused by name; the folder is checked like any model.
    """
    if dry_run:
        done = api.forecast_convert(file, out, config=config, revision=revision)
    else:
        with screen.bars() as progress:
            done = api.convert(file, out, config=config, revision=revision, progress=progress)
    rows = [("the file", done.what), *(("guess", done.guess) for _ in range(bool(done.guess)))]
    rows.append(("converted", ", ".join(done.converted)))
    if done.copied:
        rows.append(("from the config", ", ".join(done.copied)))
    rows += [(f"not needed: {what}", str(number)) for what, number in sorted(done.unneeded.items())]
    if done.widened:
        rows.append(("now bfloat16", ", ".join(done.widened)))
    rows.append(("converted weights", f"{done.converted_bytes / 1e9:,.2f} GB"))
    screen.table(rows)
    if dry_run:
        screen.say("nothing was written")
    else:
        screen.say(f"wrote {done.out}\nnext: edgeprune compress {done.out} -o small")
    if as_json:
        screen.print_json(done.to_json())
