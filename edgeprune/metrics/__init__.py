"""Metrics: of images and their prompts, or of a transformer itself. A new one is one new file and one line of KNOWN.

An image metric's file has a class METRIC that is an `ImageMetric`; `edgeprune score` asks it about images that are
already made, `analyze` about those that a pipeline draws as it is now. Imports no vendor.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common import extras
from edgeprune.common.errors import InputError
from edgeprune.sampling.generation import Generation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Images = Sequence["NDArray[np.uint8]"]
"""Each (H, W, 3)."""

_CLIP = "a CLIP folder of transformers or its hub id, such as openai/clip-vit-large-patch14"

_DETECTOR = "a Mask2Former folder of transformers or its hub id, facebook/mask2former-swin-small-coco-instance"


@dataclass(frozen=True)
class Known:
    """What is known of a metric without importing it."""

    module: str
    packages: tuple[str, ...] = ()
    """What it imports beyond the core; the extra of the metric's own name brings them."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Names of the weights that it takes, each with what to give."""
    paired: bool = False
    """Compares each image with the original's of the same prompt and seed."""
    lower_is_better: bool = False
    tasks: str | None = None
    """Module with the prompts that it is made for, and `parse`, which tells a prompt's task; None if any will do."""


_TORCH, _TRANSFORMERS = ("torch",), ("torch", "transformers")
KNOWN = {
    "shapes": Known("shapes_score", tasks="edgeprune.shapes"),
    "clip": Known("clip_score", _TRANSFORMERS, {"clip": _CLIP}),
    "hpsv2": Known(
        "hps", _TRANSFORMERS, {"hpsv2": "a folder that `python -m edgeprune.metrics.hps` made of HPS v2.1's file"}
    ),
    "geneval": Known(
        "geneval",
        (*_TRANSFORMERS, "scipy"),
        {
            "geneval": _DETECTOR,
            "clip": f"{_CLIP}, which names the colours",
        },
        tasks="edgeprune.metrics.geneval_rules",
    ),
    "psnr": Known("psnr", paired=True),
    "ssim": Known("ssim", ("scipy",), paired=True),
    "lpips": Known(
        "lpips_distance",
        _TORCH,
        {"lpips": "a safetensors file made by the command in docs/metrics.md"},
        paired=True,
        lower_is_better=True,
    ),
}
"""Image metrics by name."""
VELOCITY = "velocity"
"""The one metric of the transformer itself, which only `analyze` can ask."""


class ImageMetric(Protocol):
    """See the module."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        """Load. `weights` holds at least what KNOWN says."""

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """One value per image; `originals` are there for paired metrics."""


class Metric(Protocol):
    """Of a running pipeline: prepared once with the untouched model, then asked again and again."""

    name: str

    def score(self) -> list[float]:
        """Score the pipeline's transformer as it is now: one value per prompt, higher is better."""


def require(name: str, weights: Mapping[str, str]) -> Known:
    """What is known of an image metric, once all that it needs is there.

    Raises:
        InputError: no image metric of this name, or weights that it takes are not given.
        MissingExtraError: a package that it imports is not installed.
    """
    if name not in KNOWN:
        raise InputError(f"--metric: found {name!r}, expected one of {', '.join(KNOWN)}")
    known = KNOWN[name]
    extras.require(known.packages, name)
    for wanted, what in known.weights.items():
        if wanted not in weights:
            raise InputError(f"--metric {name}: no weights; give --weights {wanted}=PATH: {what}")
    return known


def parse_weights(given: Sequence[str]) -> dict[str, str]:
    """`clip=./clip` and the like, by name.

    Raises:
        InputError: not of this form, an unknown name, or one given twice.
    """
    names = dict.fromkeys(name for known in KNOWN.values() for name in known.weights)
    out: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in names or not path or name in out:
            raise InputError(f"--weights: found {text!r}, expected NAME=PATH once for each of {', '.join(names)}")
        out[name] = path
    return out


def of_images(name: str, weights: Mapping[str, str]) -> ImageMetric:
    """An image metric, loaded.

    Raises:
        InputError: unknown name, or weights that are missing or not usable.
        MissingExtraError: a package that it imports is not installed.
    """
    known = require(name, weights)
    found: ImageMetric = importlib.import_module(f"{__name__}.{known.module}").METRIC(weights)
    return found


def tasks_of(name: str) -> ModuleType | None:
    """The module of a metric's own prompts and their tasks, if it has such."""
    module = KNOWN[name].tasks if name in KNOWN else None
    return importlib.import_module(module) if module else None


def check_analysis(name: str, weights: Mapping[str, str], prompts: Sequence[str] = ()) -> None:
    """Refuse a metric for `analyze` before anything is loaded.

    Raises:
        InputError: unknown name, missing weights, or a prompt that the metric is not made for.
        MissingExtraError: a package that it imports is not installed.
    """
    if name == VELOCITY:
        return
    if name not in KNOWN:
        raise InputError(f"--metric: found {name!r}, expected one of {', '.join([VELOCITY, *KNOWN])}")
    require(name, weights)
    if tasks := tasks_of(name):
        for prompt in prompts:
            tasks.parse(prompt)


def of_pipeline(
    name: str, pipe: Any, generation: Generation, prompts: list[str], weights: Mapping[str, str] | None = None
) -> Metric:
    """Any metric, prepared for a pipeline.

    Raises:
        InputError: unknown name, or weights that are missing or not usable.
        MissingExtraError: a package that it imports is not installed.
    """
    weights = weights or {}
    check_analysis(name, weights, prompts)
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError(pipe, generation, prompts)
    from edgeprune.metrics.drawn import Drawn

    return Drawn(name, of_images(name, weights), pipe, generation, prompts)


def evaluations(name: str, generation: Generation, prompts: int, per_step: int) -> int:
    """How many samples go through the transformer for one score, `per_step` of them in each step of an image."""
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError.evaluations(generation, prompts)
    return prompts * generation.num_inference_steps * per_step


def preparing(name: str, generation: Generation, prompts: int, per_step: int) -> int:
    """How many samples go through the transformer before the first score."""
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError.preparing(generation, prompts, per_step)
    return 0
