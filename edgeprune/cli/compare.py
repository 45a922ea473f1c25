"""`edgeprune compare`: many methods at one budget."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import check_out, check_places, is_begun, open_folder, world_given
from edgeprune.cli import choices, limits, options, screen
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split

EPILOG = (
    "Example: edgeprune compare -o build/compare  ·  edgeprune compare --teacher rich-sd3 -o build/rich-sd3  ·  "
    "edgeprune compare ./sd35 -o grid --grid mine.toml --data images/ --memory 8GB --yes  ·  "
    "edgeprune compare ./sd35 -o grid --data images/ --metric geneval --weights geneval=./mask2former "
    "--weights clip=./clip --reference ./sana-sprint"
)


def grids() -> Iterable[str]:
    """Return the names of the grids that come with edgeprune."""
    folder = Path(__file__).parents[1] / "compare" / "grids"
    return sorted(path.stem for path in folder.glob("*.toml"))


def teachers() -> Iterable[str]:
    """Return the names of the teachers of shapes world."""
    from edgeprune.artefact.teachers import TEACHERS

    return TEACHERS


def compare(
    model: options.Model = None,
    teacher: Annotated[
        str | None,
        choices.choice(
            names=teachers, help="Compress a teacher of shapes world instead of MODEL (docs/teachers.md).",
            show_default="shapes, the built-in model",
        ),
    ] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to create, or to resume if it exists.")
    ] = Path("compare"),
    preset: Annotated[
        str | None, choices.choice(names=grids, help="Grid that comes with edgeprune.", show_default="demo")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own grid as TOML, instead of --preset (docs/evidence.md).")
    ] = None,
    metric: Annotated[
        str | None,
        choices.choice(
            names=choices.analysis_metrics, help="How models are scored.",
            show_default="shapes for teachers of shapes world, else velocity",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also score another architecture on the same prompts and seeds: any text-to-image folder of diffusers "
            "(docs/references.md).",
        ),
    ] = None,
    weights: Annotated[list[str] | None, options.weights_of_metrics()] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text file with one prompt per line to score on. Use none that the models were trained on.",
            show_default="the metric's own prompts, else held-out captions",
        ),
    ] = None,
    data: options.DataSource = None,
    per_task: Annotated[
        int, typer.Option(min=1, help="Teachers of shapes world and geneval: number of prompts of each task.")
    ] = 30,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Score on the tuning prompts and seeds, to choose options. Judge what you chose without it.",
        ),
    ] = False,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Compress with many methods at one budget and score all on the same prompts: compare.md, compare.svg."""
    if preset and grid:
        raise InputError("give --preset or --grid, not both")
    if teacher:
        from edgeprune.artefact.teachers import model_of

        if model is not None:
            raise InputError(f"--teacher {teacher}: {model} is given, too; give a model or --teacher, not both")
        model = model_of(teacher)
    original = out / "original"
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    check_out(out)
    check_places(original, model, revision)
    from edgeprune.artefact.resolve import resolve
    from edgeprune.compare import page as compare_page
    from edgeprune.compare import reference as other
    from edgeprune.compare import run as comparison
    from edgeprune.compare.grid import Grid, grid_named
    from edgeprune.data.settings import check_source
    from edgeprune.metrics import check_analysis, parse_weights
    from edgeprune.stages import compress

    if data:
        check_source(data)
    opening = functools.partial(open_folder, original, model, revision=revision, variant=variant, compute=compute)
    ws = opening() if is_begun(original) else None
    if teacher and model is None and ws and not ws.builtin:
        raise InputError(f"-o {out}: begun with {ws.manifest.source}, not with --teacher {teacher}; use another -o")
    world = ws.world if ws else world_given(original, model)
    name, paths = metric or ("shapes" if world else "velocity"), parse_weights(weights or [])
    check_analysis(name, paths)
    if reference:
        other.check(reference, name)
    path = grid or grid_named(preset or "demo")
    rows = Grid.load(path, compress.preset("default", world=world, data=data))
    comparison.check_rows(rows, world=world)
    split = Split.TUNING if tune else Split.HELD_OUT
    texts = comparison.prompts_to_score(world, prompts, per_task, name, split)
    if dry_run:
        source = ws.source if ws else resolve(model, revision, variant)
        weights_variant = ws.variant if ws else variant
        numbers = comparison.forecast_grid(source, rows, len(texts), name, out, weights_variant, compute)
        return screen.show_forecast(numbers, screen.FLOORS, as_json)
    ws = ws or opening(begin=True)
    with screen.bars() as progress:
        summary = comparison.compare(
            ws, rows, name, texts, out, progress, weights=paths, split=split, reference=reference
        )
    written = compare_page.write(summary, out)
    screen.table([compare_page.HEADINGS, *compare_page.cells(summary)])
    screen.say(compare_page.NOTE)
    screen.say("wrote " + ", ".join(map(str, written)))
    first = screen.quoted(out / rows.reference / "seed-0")
    screen.say(f"next: edgeprune export {first} --target onnx -o {screen.quoted(out / rows.reference, '-onnx')}")
    if as_json:
        screen.print_json(summary)
