"""An image metric applied to the images that a pipeline generates in its current state, for `analyze`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.splits import Split
from edgeprune.metrics import KNOWN, ImageMetric
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation


class Drawn:
    """Generates one image per prompt and seed, and scores them. Every image has its own seed, so that scenes differ.

    Paired metrics compare with the images that the model generated when this object was created.
    """

    def __init__(
        self,
        name: str,
        metric: ImageMetric,
        pipe: Any,
        generation: Generation,
        prompts: list[str],
        *,
        split: Split,
        seeds: int = 1,
    ) -> None:
        self.name, self.metric, self.pipe, self.generation = name, metric, pipe, generation
        self.split, self.seeds = split, seeds
        self.texts = [p for p in prompts for _ in range(seeds)]
        self.sign = -1.0 if KNOWN[name].lower_is_better else 1.0
        self.originals = list(self.images()) if KNOWN[name].paired else None

    def images(self) -> NDArray[np.uint8]:
        """Generate images (prompts * seeds, H, W, 3); the seeds of one prompt are adjacent."""
        return generate(self.pipe, self.texts, self.split.seeds(len(self.texts)), self.generation)

    def score(self) -> list[float]:
        """Return the mean over its seeds for each prompt; higher is better."""
        values = self.metric.score(list(self.images()), self.texts, self.originals)
        return [self.sign * float(v) for v in np.asarray(values, dtype=float).reshape(-1, self.seeds).mean(1)]
