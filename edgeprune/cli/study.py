"""`edgeprune study`: make one, serve it, read what came out. What it leaves out: logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.common.errors import InputError
from edgeprune.common.terminal import printable

study = typer.Typer(
    no_args_is_help=True, help="Ask people: rate variants of images blindly in a web page of this machine."
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]


def _variants(given: list[str]) -> dict[str, Path]:
    out: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--variants: found {text!r}, expected NAME=FOLDER")
        if name in out:
            raise InputError(f"--variants: {name} is there twice")
        out[name] = Path(folder)
    return out


@study.command(
    epilog="Example: edgeprune study new taste --variants original=images/original ours=images/ours "
    "--prompts prompts.txt"
)
def new(
    folder: Folder,
    # An option takes one value in click: of `--variants a=x b=y` the rest arrives here.
    more: Annotated[list[str] | None, typer.Argument(metavar="NAME=FOLDER", help="More variants.")] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER ...",
            help="One folder of images (.png, .jpg, .webp) for each variant, with equal names; the original first.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file whose n-th line is the prompt of the n-th image by name, or a .jsonl file with file_name "
            "and text; by default metadata.jsonl in the original's folder."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="mos (grades from 1 to 5) or pairs (side by side).")] = "mos",
    title: Annotated[str, typer.Option(help="What raters read above the study.")] = "Image study",
    per_rater: Annotated[
        int | None, typer.Option(help="Trials of one rater; by default every image or pair, at most 60.")
    ] = None,
    checks: Annotated[int, typer.Option(min=0, help="Attention checks of one rater.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the random order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a study from folders of images, one for each variant."""
    from edgeprune.user_study.make import make

    made = make(
        folder, _variants([*(variants or []), *(more or [])]), prompts=prompts, mode=mode, title=title,
        per_rater=per_rater, checks=checks, seed=seed,
    )  # fmt: skip
    typer.echo(
        f"{folder}: {len(made.prompts)} prompts, {len(made.variants)} variants, original: {made.variants[0]}; "
        f"{made.per_rater} trials and {made.checks} attention checks for each rater",
        err=True,
    )
    typer.echo(f"next: edgeprune study serve {folder}", err=True)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "variants": made.variants, "per_rater": made.per_rater}))


@study.command(
    epilog="Example: edgeprune study serve taste  ·  edgeprune study serve taste --host 0.0.0.0 --token a-long-secret"
)
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(help="Secret that has to be in the link which raters begin with.")
    ] = None,
) -> None:
    """Open the study's page until Ctrl-C. Answers are on disk at once; start it again to go on."""
    from edgeprune.user_study.server import StudyServer

    with StudyServer(folder, host, port, token) as server:
        typer.echo(f"raters begin at {server.address}", err=True)
        typer.echo(f"stop with Ctrl-C; then: edgeprune study results {folder}", err=True)
        server.serve_forever()


@study.command(epilog="Example: edgeprune study results taste --json")
def results(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for table, plot and CSV; by default DIR/results.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """MOS or preferences with 95 % intervals, drop against the original, paired tests, agreement among raters."""
    from rich.console import Console

    from edgeprune.user_study import design
    from edgeprune.user_study import results as outcome

    given = outcome.gather(design.read(folder), folder)
    summary = outcome.summarise(given)
    console = Console()
    for table in outcome.tables(summary):
        console.print(table)
    for note in outcome.notes(summary):
        console.print(printable(note), markup=False, highlight=False)
    for path in outcome.write(given, summary, out or folder / "results"):
        typer.echo(f"wrote {path}", err=True)
    if as_json:
        typer.echo(json.dumps(summary, allow_nan=False))
