"""The shapes-world score: share of a prompt's images that satisfy its meaning, by the checker. See demo/shapes.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprune.demo import shapes
from edgeprune.generation import Generation
from edgeprune.sampling import generate


class ShapesScore:
    """One image per prompt and seed; the seed also depends on the prompt, so that scenes differ."""

    name = "shapes"

    def __init__(self, pipe: Any, generation: Generation, prompts: list[str], *, seeds: int = 1) -> None:
        self.pipe, self.generation, self.seeds = pipe, generation, seeds
        self.prompts = prompts
        self.meanings = [shapes.parse(p) for p in prompts]

    @staticmethod
    def evaluations(generation: Generation, prompts: int, per_step: int) -> int:
        """All steps of an image."""
        return prompts * generation.num_inference_steps * per_step

    @staticmethod
    def preparing(generation: Generation, prompts: int, per_step: int) -> int:
        """None."""
        return 0

    def images(self) -> Any:
        """(prompts * seeds, 64, 64, 3), the seeds of a prompt side by side."""
        texts = [p for p in self.prompts for _ in range(self.seeds)]
        return generate(self.pipe, texts, list(range(len(texts))), self.generation)

    def score(self) -> list[float]:
        """Share of satisfied images per prompt."""
        meanings = [m for m in self.meanings for _ in range(self.seeds)]
        passed = [shapes.check(i, m) for i, m in zip(self.images(), meanings, strict=True)]
        return [float(v) for v in np.asarray(passed, dtype=float).reshape(-1, self.seeds).mean(1)]


METRIC = ShapesScore
