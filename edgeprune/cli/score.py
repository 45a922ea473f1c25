"""`edgeprune score`: images by any metric."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.api.folders import check_model, check_out
from edgeprune.cli import choices, options, screen
from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.metrics.scoring import Score, Wish

EPILOG = (
    "Example: edgeprune score small --against built-in --metric shapes  ·  "
    "edgeprune score images --against ./sd35 --metric psnr --metric clip --weights clip=./clip  ·  "
    "edgeprune score small-onnx --metric geneval --weights geneval=./mask2former --weights clip=./clip -o scored"
)


Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Original to compare with: a model folder, a hub id, built-in, or images of the same prompts.",
    ),
]


def score(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Model to draw with, or folder of images with metadata.jsonl.")
    ],
    metric: Annotated[
        list[str],
        choices.choice(
            names=choices.image_metrics,
            help="How images are scored. psnr, ssim and lpips need --against. Repeat the option for several metrics.",
        ),
    ],
    against: Against = None,
    weights: Annotated[list[str] | None, options.weights_of_metrics()] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text file with one prompt per line.",
            show_default="the metric's own prompts, else a list that comes with edgeprune",
        ),
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="geneval, shapes: number of prompts of each task.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    runtime: options.RuntimeName = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of an image.", show_default="the model's own")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Keep the images here. An interrupted run resumes with them."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Score images by any metric, with 95 % intervals.

    With --against it also shows what was lost, in pairs of images of the same prompt.
    """
    from edgeprune.metrics import parse_weights, scoring

    for model in (folder, *([against] if against else [])):
        check_model(model)
    if out:
        check_out(out)
    paths = parse_weights(weights or [])
    scoring.check(metric, paths, against is not None)
    places = {"images": _images_or_model(folder)} | ({"original": _images_or_model(against)} if against else {})
    ready = [path for path in places.values() if scoring.is_images(path)]
    if ready and (prompts or per_task or seeds > 1):
        raise InputError(f"{ready[0]} already has prompts; omit --prompts, --per-task and --seeds")
    if ready:
        wishes = _wishes_of(ready[0], metric)
    else:
        wishes = scoring.wishes(metric, prompts=prompts, per_task=per_task, seeds=seeds)
    scores = _drawn_and_scored(places, ready, wishes, metric, paths, runtime, steps, out)
    screen.table(scoring.rows(scores))
    count, texts = scores[0].images, len(scores[0].prompts)
    intervals = "95 % bootstrap intervals over prompts" if texts > 1 else "no interval"
    screen.say(f"{count} images of {texts} prompt{'s' if texts > 1 else ''}; {intervals}")
    if out:
        screen.say(f"the images are in {out}")
    if not against:
        screen.say(f"next: edgeprune score {folder} --against ORIGINAL --metric {metric[0]} shows what was lost")
    elif not out and len(ready) < len(places):
        screen.say("next: the same command with -o DIR keeps the images, so that they can be scored again")
    if as_json:
        from edgeprune.common.files import sha256_file

        settings = {"folder": folder, "against": against, "weights": paths, "steps": steps}
        settings["prompts_sha256"] = sha256_file(prompts) if prompts else None
        screen.print_json(scoring.to_json(scores) | {"settings": settings})


def _wishes_of(images: Path, metric: list[str]) -> list[Wish]:
    """Return the prompts and seeds of images that exist already."""
    from edgeprune.data.imagefolder import read_samples
    from edgeprune.metrics import scoring

    wishes = [scoring.Wish(s.text, i if s.seed is None else s.seed) for i, s in enumerate(read_samples(images))]
    scoring.check_prompts(metric, [w.text for w in wishes])
    return wishes


def _drawn_and_scored(
    places: dict[str, Path],
    ready: list[Path],
    wishes: list[Wish],
    metric: list[str],
    weights: dict[str, str],
    runtime: str | None,
    steps: int | None,
    out: Path | None,
) -> list[Score]:
    """Draw the images that do not exist yet, and score all."""
    import tempfile
    from contextlib import ExitStack

    from edgeprune.data.imagefolder import read_samples
    from edgeprune.metrics import scoring

    with ExitStack() as stack, screen.bars() as progress:
        kept = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-score-")))
        folders = dict(places)
        for name, place in places.items():
            if place not in ready:
                # --runtime is about the export; its original is a diffusers folder.
                scoring.draw(
                    place, kept / name, wishes, runtime=runtime if name == "images" else None, steps=steps,
                    progress=progress,
                )  # fmt: skip
                folders[name] = kept / name
        samples = {name: read_samples(folder) for name, folder in folders.items()}
        return scoring.score(
            samples["images"], metric, against=samples.get("original"), weights=weights, progress=progress
        )


def _images_or_model(text: str) -> Path:
    """Return the folder of images or of a model that the user named; `built-in` is the built-in model."""
    if Path(text).is_dir():
        from edgeprune.data.imagefolder import METADATA

        folder = Path(text)
        if not any((folder / name).is_file() for name in (METADATA, "edgeprune_export.json", "model_index.json")):
            raise InputError(
                f"{folder}: found none of {METADATA} (images with their prompts), edgeprune_export.json (an export), "
                "model_index.json (a diffusers pipeline), expected one"
            )
        return folder
    from edgeprune.artefact.resolve import resolve

    return resolve(None if text == "built-in" else text)
