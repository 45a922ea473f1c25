"""`edgeprune study`: create a user study, serve it, and read its results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import choices, limits, options, screen
from edgeprune.common.errors import InputError
from edgeprune.common.terminal import printable

app = typer.Typer(
    no_args_is_help=True,
    help="Let people rate images blindly, in a web page on this machine.",
    epilog="Example: edgeprune study new taste --variants original=a ours=b  ·  edgeprune study serve taste",
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.")]


def modes() -> Iterable[str]:
    """Return the kinds of study."""
    from edgeprune.user_study.design import MODES

    return MODES


def _variants(texts: list[str]) -> dict[str, Path]:
    out: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--variants: found {text!r}, expected NAME=FOLDER")
        if name in out:
            raise InputError(f"--variants: {name} is given twice")
        out[name] = Path(folder)
    return out


@app.command(
    cls=choices.Verb,
    epilog="Example: edgeprune study new taste --variants original=images/original ours=images/ours "
    "--prompts prompts.txt  ·  edgeprune study new taste --variants original=scored/original sana=./sana-sprint",
)
def new(
    folder: Folder,
    # An option takes one value in click: of `--variants a=x b=y` the rest arrives here.
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=FOLDER", help="The other variants, so that `--variants` can take several."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER ...",
            help="One folder of images (.png, .jpg, .webp) per variant, the original first. Files of the same name "
            "belong together. Another architecture may be a text-to-image folder of diffusers, which then draws the "
            "original's prompts (docs/references.md).",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text file whose n-th line is the prompt of the n-th image by name, or a .jsonl file with file_name "
            "and text.",
            show_default="metadata.jsonl in the original's folder",
        ),
    ] = None,
    mode: Annotated[
        str,
        choices.choice(
            names=modes, help="What raters do: mos grades single images from 1 to 5, pairs compares two side by side."
        ),
    ] = "mos",
    title: Annotated[str, typer.Option(metavar="TEXT", help="Title that raters see above the study.")] = "Image study",
    per_rater: Annotated[
        int | None,
        typer.Option(help="Number of trials of one rater.", show_default="every image or pair, at most 60"),
    ] = None,
    checks: Annotated[int, typer.Option(min=0, help="Number of attention checks of one rater.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the random order.")] = 0,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    as_json: options.AsJson = False,
) -> None:
    """Create a study from folders of images, one per variant."""
    from edgeprune.user_study.make import make

    compute = limits.compute_options(device, memory) if device != "auto" or memory else None
    made = make(
        folder, _variants([*(variants or []), *(more or [])]), prompts=prompts, mode=mode, title=title,
        per_rater=per_rater, checks=checks, seed=seed, compute=compute,
    )  # fmt: skip
    screen.say(
        f"{folder}: {len(made.prompts)} prompts, {len(made.variants)} variants, original: {made.variants[0]}; "
        f"{made.per_rater} trials and {made.checks} attention checks for each rater",
    )
    screen.say(f"next: edgeprune study serve {screen.quoted(folder)}")
    if as_json:
        screen.print_json({"folder": str(folder), "variants": made.variants, "per_rater": made.per_rater})


@app.command(
    cls=choices.Verb,
    epilog="Example: edgeprune study serve taste  ·  edgeprune study serve taste --host 0.0.0.0 --token a-long-secret",
)
def serve(
    folder: Folder,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on. Any but this machine's own needs --token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(metavar="SECRET", help="Secret that the raters' link must contain.")
    ] = None,
) -> None:
    """Serve the study's page until Ctrl-C.

    Every answer is saved at once. Start the command again to continue.
    """
    from edgeprune.user_study.server import StudyServer

    with StudyServer(folder, host, port, token) as server:
        screen.say(f"raters begin at {server.address}")
        screen.say(f"stop with Ctrl-C; then: edgeprune study results {folder}")
        server.serve_forever()


@app.command(cls=choices.Verb, epilog="Example: edgeprune study results taste --json")
def results(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder for table, plot and CSV.", show_default="DIR/results"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show MOS or preferences with 95 % intervals.

    Also shows the drop from the original, paired tests and the agreement among raters.
    """
    from rich.console import Console

    from edgeprune.user_study import design
    from edgeprune.user_study import results as outcome

    answers = outcome.gather(design.read(folder), folder)
    summary = outcome.summarise(answers)
    console = Console()
    for table in outcome.tables(summary):
        console.print(table)
    for note in outcome.notes(summary):
        console.print(printable(note), markup=False, highlight=False)
    for path in outcome.write(answers, summary, out or folder / "results"):
        screen.say(f"wrote {path}")
    if as_json:
        screen.print_json(summary)
