"""An image metric asked about the images that a pipeline draws as it is now, as `analyze` does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.metrics import KNOWN, ImageMetric
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation


class Drawn:
    """One image per prompt and seed; the seed also depends on the prompt, so that scenes differ.

    A paired metric compares with the images of the model as it was when this was made.
    """

    def __init__(
        self,
        name: str,
        metric: ImageMetric,
        pipe: Any,
        generation: Generation,
        prompts: list[str],
        *,
        seeds: int = 1,
    ) -> None:
        self.name, self.metric, self.pipe, self.generation, self.seeds = name, metric, pipe, generation, seeds
        self.texts = [p for p in prompts for _ in range(seeds)]
        self.sign = -1.0 if KNOWN[name].lower_is_better else 1.0
        self.originals = list(self.images()) if KNOWN[name].paired else None

    def images(self) -> NDArray[np.uint8]:
        """(prompts * seeds, H, W, 3), the seeds of a prompt side by side."""
        return generate(self.pipe, self.texts, list(range(len(self.texts))), self.generation)

    def score(self) -> list[float]:
        """Mean over a prompt's seeds, for each prompt; higher is better."""
        values = self.metric.score(list(self.images()), self.texts, self.originals)
        return [self.sign * float(v) for v in np.asarray(values, dtype=float).reshape(-1, self.seeds).mean(1)]
