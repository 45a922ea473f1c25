"""What a change of the built-in model costs on captions that nothing has seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import shapes
from edgeprune.common.splits import Split
from edgeprune.metrics.psnr import decibels
from edgeprune.metrics.velocity import VelocityError
from edgeprune.sampling.denoising import generate
from edgeprune.stages.workspace import Workspace

PER_TASK = 4
"""Captions of each task of shapes world."""


class Held:
    """Held-out captions: six states on each of the original's trajectories, and its images."""

    def __init__(self, ws: Workspace, per_task: int = PER_TASK) -> None:
        found = shapes.evaluation_prompts(per_task)
        by_task = [[p for p in found if p.meaning.task == task] for task in shapes.TASKS]
        self.ws, self.prompts = ws, [prompt for group in zip(*by_task, strict=True) for prompt in group]
        self.captions = [prompt.text for prompt in self.prompts]
        self.metric = VelocityError(ws.pipe, ws.generation, self.captions, split=Split.HELD_OUT)
        self.images = self._drawn()

    @property
    def tasks(self) -> list[str]:
        """The task of each caption."""
        return [prompt.meaning.task for prompt in self.prompts]

    def measure(self, model: Any) -> dict[str, list[float]]:
        """Return the velocity error, the PSNR to the original's image, and whether the image is right, by caption."""
        pipe, original = self.ws.pipe, self.ws.pipe.transformer
        pipe.transformer = model
        try:
            error, images = [-value for value in self.metric.score()], self._drawn()
        finally:
            pipe.transformer = original
        pairs = list(zip(images, self.prompts, strict=True))
        return {
            "error": error,
            "decibels": [decibels(first, other) for first, other in zip(self.images, images, strict=True)],
            "right": [float(shapes.check(image, prompt.meaning)) for image, prompt in pairs],
        }

    def _drawn(self) -> NDArray[np.uint8]:
        seeds = Split.HELD_OUT.seeds(len(self.captions))
        return generate(self.ws.pipe, self.captions, seeds, self.ws.generation)
