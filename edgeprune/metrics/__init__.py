"""Metrics of images with their prompts, or of a transformer itself. A new metric is a new file and an entry in KNOWN.

The file of an image metric defines METRIC, an `ImageMetric` class. `edgeprune score` applies it to existing images,
`analyze` to images that a pipeline generates. This module imports no optional package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common import extras
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.sampling.generation import Generation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeprune.residency.spill import Spill
    from edgeprune.shapes import World

Images = Sequence["NDArray[np.uint8]"]
"""Each (H, W, 3)."""

_CLIP = "a CLIP folder of transformers or its hub id, such as openai/clip-vit-large-patch14"

_DETECTOR = "a Mask2Former folder of transformers or its hub id, facebook/mask2former-swin-small-coco-instance"


@dataclass(frozen=True)
class Known:
    """Facts about a metric without importing it."""

    module: str
    packages: tuple[str, ...] = ()
    """The optional packages that it imports; the extra with the metric's name installs them."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """The weights that it needs, by name, with a description of what to pass."""
    paired: bool = False
    """It compares each image with the original model's image of the same prompt and seed."""
    lower_is_better: bool = False
    own_prompts: bool = False
    """It has prompts of its own, see `tasks_of`; others take any prompt."""

    @property
    def computes(self) -> bool:
        """Whether it has networks, which run in torch."""
        return "torch" in self.packages


_TORCH, _TRANSFORMERS = ("torch",), ("torch", "transformers")
KNOWN = {
    "shapes": Known("shapes_score", own_prompts=True),
    "clip": Known("clip_score", _TRANSFORMERS, {"clip": _CLIP}),
    "hpsv2": Known(
        "hps", _TRANSFORMERS, {"hpsv2": "a folder that `python -m edgeprune.metrics.hps` made from HPS v2.1's file"}
    ),
    "geneval": Known(
        "geneval",
        (*_TRANSFORMERS, "scipy"),
        {
            "geneval": _DETECTOR,
            "clip": f"{_CLIP}, to name colours",
        },
        own_prompts=True,
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
"""The only metric of the transformer itself; only `analyze` can use it."""


class Tasks(Protocol):
    """Prompts of a metric's own, or of a world: each belongs to a task."""

    def evaluation_prompts(self, per_task: int = ..., *, split: Split = ...) -> list[Any]:
        """Return prompts of a split, task by task, each with `text` and `meaning.task`."""

    def parse(self, text: str) -> Any:
        """Return the meaning of a prompt, with its `task`.

        Raises:
            InputError: the prompt is none of these.
        """


class ImageMetric(Protocol):
    """Scores images, given their prompts."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        """Load the metric; `weights` has at least the names listed in KNOWN, networks go to `device`."""

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return one value per image. Paired metrics need `originals`."""


class Metric(Protocol):
    """Scores a pipeline: prepared once with the unmodified model, then asked after each modification."""

    name: str

    def score(self) -> list[float]:
        """Return one value per prompt for the transformer in its current state; higher is better."""


def require(name: str, weights: Mapping[str, str]) -> Known:
    """Return the entry of an image metric after checking that everything it needs is available.

    Raises:
        InputError: there is no image metric of this name, or its weights are not given.
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
    """Parse values of --weights such as `clip=./clip`; return the paths by name.

    Raises:
        InputError: a value does not have this form, or its name is unknown or repeated.
    """
    names = dict.fromkeys(name for known in KNOWN.values() for name in known.weights)
    out: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in names or not path or name in out:
            raise InputError(f"--weights: found {text!r}, expected NAME=PATH once for each of {', '.join(names)}")
        out[name] = path
    return out


def of_images(name: str, weights: Mapping[str, str], device: str = "auto") -> ImageMetric:
    """Load an image metric.

    Args:
        name: one of KNOWN.
        weights: paths by name.
        device: where its networks compute, if it has any: auto, cpu, cuda, cuda:1, mps or xpu.

    Raises:
        InputError: the name is unknown, or weights are missing or not usable.
        MissingExtraError: a package that it imports is not installed.
    """
    known = require(name, weights)
    metric: ImageMetric = importlib.import_module(f"{__name__}.{known.module}").METRIC(weights, device)
    return metric


def tasks_of(name: str, world: World | None) -> Tasks | None:
    """Return a metric's own prompts; None if it has none.

    Args:
        name: of the metric.
        world: that the model draws, whose captions `shapes` takes; of a model that draws none, the plain one's.
    """
    if name not in KNOWN or not KNOWN[name].own_prompts:
        return None
    if name == "shapes":
        from edgeprune.shapes import PLAIN

        return (world or PLAIN).grammar
    from edgeprune.metrics import geneval_rules

    return geneval_rules


def check_analysis(
    name: str, weights: Mapping[str, str], prompts: Sequence[str] = (), *, world: World | None = None
) -> None:
    """Check a metric for `analyze` before anything is loaded.

    Args:
        name: of the metric.
        weights: that it needs.
        prompts: that it will get.
        world: that the model draws, see `tasks_of`.

    Raises:
        InputError: the name is unknown, weights are missing, or the metric does not support a prompt.
        MissingExtraError: a package that it imports is not installed.
    """
    if name == VELOCITY:
        return
    if name not in KNOWN:
        raise InputError(f"--metric: found {name!r}, expected one of {', '.join([VELOCITY, *KNOWN])}")
    require(name, weights)
    if tasks := tasks_of(name, world):
        for prompt in prompts:
            tasks.parse(prompt)


def of_pipeline(
    name: str,
    pipe: Any,
    generation: Generation,
    prompts: list[str],
    weights: Mapping[str, str] | None = None,
    *,
    split: Split,
    world: World | None = None,
    device: str = "auto",
    compares: bool = True,
    spill: Spill | None = None,
    progress: Progress = silent,
) -> Metric:
    """Prepare a metric for a pipeline, with the noise of a split.

    Args:
        world: that the model draws, see `tasks_of`.
        device: where an image metric's own networks compute; velocity runs where the pipeline is.
        compares: whether `score` will be called; without it, velocity measures only its trajectories.
        spill: keeps the states of velocity's trajectories, so that a run after a kill goes on with them.
        progress: called after each step of those.

    Raises:
        InputError: the name is unknown, or weights are missing or not usable.
        MissingExtraError: a package that it imports is not installed.
    """
    weights = weights or {}
    check_analysis(name, weights, prompts, world=world)
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError(pipe, generation, prompts, split=split, compares=compares, spill=spill, progress=progress)
    from edgeprune.metrics.drawn import Drawn

    return Drawn(name, of_images(name, weights, device), pipe, generation, prompts, split=split)


def evaluations(name: str, generation: Generation, prompts: int, by_step: Callable[[int], list[int]]) -> int:
    """Return how many samples pass through the transformer for one score.

    Args:
        prompts: the number of prompts.
        by_step: returns the samples of each denoising step of an image of so many steps; 2 with guidance.
    """
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError.evaluations(generation, prompts)
    return prompts * sum(by_step(generation.num_inference_steps))


def preparing(name: str, generation: Generation, prompts: int, by_step: Callable[[int], list[int]]) -> int:
    """Return how many samples pass through the transformer before the first score; arguments as in `evaluations`."""
    if name == VELOCITY:
        from edgeprune.metrics.velocity import VelocityError

        return VelocityError.preparing(generation, prompts, by_step)
    return 0
