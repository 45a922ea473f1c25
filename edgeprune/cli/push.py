"""`edgeprune push`: publish a folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import options, screen

EPILOG = "Example: edgeprune push small me/sd35-small --dry-run  ·  edgeprune push small me/sd35-small --private"


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Finished artefact folder, or export.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Model repository as OWNER/NAME; created if it does not exist.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository. One that exists must be private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch; created if it does not exist.", show_default="main"),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("-m", "--message", metavar="TEXT", help="Commit message.", show_default="names the folder"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and their sizes, and stop. Nothing is uploaded.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Publish a finished artefact or export on the Hugging Face Hub.

    Every file is first compared with its hash. The token is that of `hf auth login`, or HF_TOKEN.
    """
    with screen.bars() as progress:
        if not dry_run:
            done = api.push_to_hub(
                folder, repo, private=private, revision=revision, commit_message=message, progress=progress
            )
        else:
            expected = api.forecast_push(folder, progress=progress)
    if dry_run:
        rows = [*expected.files_bytes.items(), ("all files", expected.total_bytes)]
        screen.table([(name, f"{size / 1e6:,.3f} MB") for name, size in rows])
        screen.say(f"nothing was uploaded; without --dry-run these files go to {repo}")
        return screen.print_json(expected.to_json()) if as_json else None
    screen.say(f"{done.url}: {done.files} files, {done.total_bytes / 1e6:,.3f} MB, commit {done.commit}")
    load = "edgeprune.runtimes.load" if (folder / "edgeprune_export.json").is_file() else "edgeprune.load"
    screen.say(f"next: in Python: {load}(huggingface_hub.snapshot_download({repo!r}))")
    if as_json:
        screen.print_json(done.to_json())
