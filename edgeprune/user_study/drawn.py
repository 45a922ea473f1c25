"""Draws the images of a variant that is a reference: the original's prompts, seeds and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.files import parse_json
from edgeprune.common.images import open_image
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress
from edgeprune.common.splits import Split
from edgeprune.common.texts import lines_of, read_text
from edgeprune.data.imagefolder import METADATA


def draw(
    reference: Path,
    out: Path,
    originals: Mapping[str, Path],
    prompts: Sequence[str],
    folder: Path,
    compute: ComputeOptions,
    progress: Progress,
) -> None:
    """Draw an image for each of the original's, under its name.

    Args:
        reference: the folder that draws.
        out: the folder to create.
        originals: the original's images by name.
        prompts: one for each, in the order of names.
        folder: the original's.
        compute: where the reference draws, and in how much memory.
        progress: called after each image.

    Raises:
        InputError: the reference cannot be drawn with, or not at this size or in so much memory.
        MissingExtraError: torch or diffusers is not installed.
    """
    from edgeprune.runtimes import RUNTIMES

    RUNTIMES["eager"].require()
    from edgeprune.reference.drawing import open_drawer

    names, known = sorted(originals), _seeds(folder / METADATA)
    seeds = [known.get(name, Split.HELD_OUT.seed(place)) for place, name in enumerate(names)]
    width, height = open_image(originals[names[0]]).size
    out.mkdir(parents=True)
    with open_drawer(reference, device=compute.device, memory=compute.memory) as drawer:
        images = drawer.draw(prompts, seeds, height=height, width=width)
        for done, (name, image) in enumerate(zip(names, images, strict=True), 1):
            image.save(out / f"{name}.png")
            progress(f"images of {reference.name}", done, len(names))


def _seeds(path: Path) -> dict[str, int]:
    """Return the seeds that a metadata.jsonl has, by the name of the image without suffix."""
    seeds = {}
    for number, line in enumerate(lines_of(read_text(path)) if path.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            if entry.get("seed") is not None:
                seeds[Path(entry["file_name"]).stem] = int(entry["seed"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: expected file_name and a seed ({error})") from error
    return seeds
