"""Scores another architecture on the prompts and seeds of a grid: it is drawn as it is, never trained or compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.intervals import mean_interval, paired_drop
from edgeprune.common.splits import Split
from edgeprune.metrics import KNOWN, of_images
from edgeprune.metrics.scoring import identity
from edgeprune.reference import is_reference
from edgeprune.residency.compute import Compute

__all__ = ["NAME", "check", "identity", "score", "summarise"]

NAME = "reference_model"
"""Its entry in results.json and in the summary; `reference` there is the row that the others are compared with."""


def check(folder: Path, metric: str) -> None:
    """Refuse a folder that is no reference, or that cannot be scored by this metric, before any run.

    Raises:
        InputError: names what is expected.
    """
    if not is_reference(folder):
        raise InputError(f"--reference {folder}: expected a text-to-image folder of diffusers of another architecture")
    if metric not in KNOWN or KNOWN[metric].paired:
        fitting = ", ".join(name for name, known in KNOWN.items() if not known.paired)
        raise InputError(
            f"--reference: --metric {metric} compares with the original, expected one that looks at images: {fitting}"
        )
    from edgeprune.reference.drawing import open_drawer

    open_drawer(folder)


def score(
    folder: Path,
    metric: str,
    prompts: Sequence[str],
    weights: Mapping[str, str] | None,
    split: Split,
    compute: Compute,
    size: Mapping[str, int],
) -> dict[str, Any]:
    """Draw and score an image of each prompt; return the scores, and the bytes of the weights as they are stored.

    Raises:
        InputError: the folder cannot be drawn with, or not at this size.
    """
    from edgeprune.reference.drawing import open_drawer

    with open_drawer(folder, device=str(compute.device), memory=compute.memory) as drawer:
        images = [np.asarray(image) for image in drawer.draw(prompts, split.seeds(len(prompts)), **size)]
        reference = drawer.reference
    denoiser = reference.parts[reference.denoiser]
    return {
        "scores": of_images(metric, weights or {}, str(compute.device)).score(images, list(prompts), None),
        "pipeline": reference.pipeline,
        "bytes": denoiser.stored_bytes,
        "disk_bytes": reference.disk_bytes,
    }


def summarise(result: Mapping[str, Any], original: Mapping[str, Any], tasks: list[str] | None) -> dict[str, Any]:
    """Return its figures next to the original's.

    Args:
        result: what `score` returned.
        original: the original's entry in results.json.
        tasks: the task of each prompt, where the metric has tasks.
    """
    drop = paired_drop(np.asarray(original["scores"]), np.asarray(result["scores"]), tasks)
    return {
        "pipeline": result["pipeline"],
        "bytes": result["bytes"],
        "disk_bytes": result["disk_bytes"],
        "bytes_ratio": result["bytes"] / original["bytes"],
        "score": mean_interval(np.asarray(result["scores"]), tasks),
        "relative_drop": drop.relative,
    }
