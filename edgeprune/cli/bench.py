"""`edgeprune bench`: memory, latency and quality of what runs here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import source_of
from edgeprune.cli import choices, screen
from edgeprune.common.errors import CannotRunError

EPILOG = 'Example: edgeprune bench small-onnx --assert "peak_ratio<=0.9"  ·  edgeprune bench small-* --runtime all'


def runtimes_or_all() -> Iterable[str]:
    """Return the names of the runtimes, and `all`."""
    return (*choices.runtimes(), "all")


def bench(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Exported folders or artefact folders.")],
    runtime: Annotated[
        str | None,
        choices.choice(
            names=runtimes_or_all, show_default="the first installed one that fits",
            help="Runtime to measure; all measures every runtime that opens a folder and can run here.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Original to compare with: folder or hub id.",
            show_default="the model that the first folder was made from",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of warm steps to time.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of an image.", show_default="the model's own")
    ] = None,
    quality: Annotated[
        int, typer.Option(min=0, help="Shapes-world prompts per task to score images on; 0 scores none.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file, as JSON.")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--assert", metavar="EXPRESSION",
            help="Condition such as 'peak_ratio<=0.25'; exit code 1 if it does not hold. Repeat the option for "
            "several conditions.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Measure memory, latency and quality next to the original in bf16.

    Each variant runs in a fresh process.
    """
    from rich.console import Console

    from edgeprune.artefact.resolve import resolve
    from edgeprune.bench import assertions, results, tables
    from edgeprune.bench import run as bench_run
    from edgeprune.common.files import write_json

    for expression in check or []:
        assertions.parse_expression(expression)
    pairs = _pairs(folders, runtime)
    names = ["compressed"] if len(pairs) == 1 else [f"{folder}:{name}" for folder, name in pairs]
    variants = [bench_run.Variant("original", resolve(baseline or source_of(folders[0])), "eager", "bf16")]
    variants += [bench_run.Variant(n, folder, name) for n, (folder, name) in zip(names, pairs, strict=True)]
    result = bench_run.run(variants, repeats=repeats, steps=steps, quality=quality, progress=screen.say)
    Console().print(tables.table(result))
    if json_file:
        write_json(json_file, results.to_json(result))
        screen.say(f"wrote {json_file}")
    assertions.assert_expressions(result, check or [])


def _pairs(folders: list[Path], runtime: str | None) -> list[tuple[Path, str]]:
    """Return what to measure: folders with a runtime each. Folders that nothing here can run are named.

    Raises:
        CannotRunError: nothing here can run any of the folders.
    """
    from edgeprune import runtimes

    pairs: list[tuple[Path, str]] = []
    refusals: list[CannotRunError] = []
    for folder in folders:
        try:
            fitting = runtimes.runnable(folder) if runtime == "all" else [runtimes.choose(folder, runtime)]
        except CannotRunError as refusal:  # another device's folder, which does not stop the others
            refusals.append(refusal)
            continue
        pairs += [(folder, name) for name in fitting]
    if not pairs:
        raise refusals[0]
    for left_out in refusals:
        screen.say(f"left out: {left_out}")
    for name in {name for _, name in pairs}:
        screen.say_conflicts(name)
    return pairs
