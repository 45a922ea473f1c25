"""The image sizes that an export takes, read from its record, so that another size is refused before anything opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.files import read_json
from edgeprune.sampling.generation import Generation

Sides = dict[str, tuple[int, int]]
"""Smallest and largest pixels, by `height` and `width`."""


def exported_sides(folder: Path, generation: Generation, factor: int) -> Sides:
    """Return the sizes that an export was built for; empty for a folder whose sizes are dynamic.

    A Core ML package has the size of its generation.json. A TensorRT engine has a range, in the profile of the VAE.

    Args:
        folder: an export or a pipeline.
        generation: its settings.
        factor: pixels per latent pixel.
    """
    path = folder / "edgeprune_export.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("target") == "coreml":
        return {field: (getattr(generation, field),) * 2 for field in ("height", "width")}
    profile = _field(record, "networks", "vae_decoder", "profile", "latent_sample") or ()
    shapes = [shape for shape in profile if isinstance(shape, list) and len(shape) == 4]
    if len(shapes) != 3 or not all(isinstance(n, int) for shape in shapes for n in shape):
        return {}  # of another format; the engine itself refuses what it does not take
    least, _, largest = shapes
    return {field: (least[i] * factor, largest[i] * factor) for field, i in (("height", 2), ("width", 3))}


def _field(record: Any, *names: str) -> Any:
    for name in names:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record
