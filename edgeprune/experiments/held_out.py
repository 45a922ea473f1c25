"""What a change of a teacher costs on captions that nothing has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.intervals import mean_interval
from edgeprune.common.splits import Split
from edgeprune.common.tables import interval_text
from edgeprune.metrics.psnr import decibels
from edgeprune.metrics.velocity import VelocityError
from edgeprune.sampling.denoising import generate
from edgeprune.stages.workspace import Workspace

PER_TASK = 4
"""Captions of each task of shapes world."""
MEASURED = {"error": ("velocity error", ".3f"), "right": ("score", ".3f"), "decibels": ("PSNR, dB", ".1f")}
"""What `Held.measure` returns: name in tables, format."""
_Found = Mapping[str, Any]
"""Values by caption, and `tasks`."""


def cells(found: Sequence[_Found], *, sign: str = "") -> list[str]:
    """Return means with intervals over captions, each caption's value being its mean over `found`, as of seeds.

    A value that was not measured gives an empty cell.
    """
    out = []
    for name, (_, form) in MEASURED.items():
        if name not in found[0]:
            out.append("")
            continue
        each = np.mean([one[name] for one in found], axis=0)
        tasks = found[0]["tasks"] if name == "right" else None
        out.append(interval_text(mean_interval(list(each), tasks), sign + form))
    return out


def differences(pairs: Sequence[tuple[_Found, _Found]]) -> list[str]:
    """Return `cells` of the first less the second of each pair, caption by caption."""
    each = [
        {name: np.subtract(a[name], b[name]) for name in MEASURED if name in a and name in b}
        | {"tasks": a["tasks"]}
        for a, b in pairs
    ]  # fmt: skip
    return cells(each, sign="+")


class Held:
    """Held-out captions: six states on each of the original's trajectories, and its images."""

    def __init__(self, ws: Workspace, per_task: int = PER_TASK) -> None:
        assert ws.world is not None  # it is a teacher's
        found = ws.world.grammar.evaluation_prompts(per_task)
        by_task = [[p for p in found if p.meaning.task == task] for task in ws.world.grammar.names]
        self.ws, self.world = ws, ws.world
        self.prompts = [prompt for group in zip(*by_task, strict=True) for prompt in group]
        self.captions = [prompt.text for prompt in self.prompts]
        self.metric = VelocityError(ws.pipe, ws.generation, self.captions, split=Split.HELD_OUT)
        self.images = self._drawn()

    @property
    def tasks(self) -> list[str]:
        """The task of each caption."""
        return [prompt.meaning.task for prompt in self.prompts]

    def measure(self, model: Any, *, guided: bool = False) -> dict[str, list[float]]:
        """Return the velocity error, the PSNR to the original's image, and whether the image is right, by caption.

        Args:
            guided: the model has learned the guided velocity. Images are drawn without guidance then, and there is no
                velocity error, which is of velocities without guidance.
        """
        pipe, original = self.ws.pipe, self.ws.pipe.transformer
        pipe.transformer = model
        try:
            error = {} if guided else {"error": [-value for value in self.metric.score()]}
            images = self._drawn(guided=guided)
        finally:
            pipe.transformer = original
        pairs = list(zip(images, self.prompts, strict=True))
        return error | {
            "decibels": [decibels(first, other) for first, other in zip(self.images, images, strict=True)],
            "right": [float(self.world.check(image, prompt.meaning)) for image, prompt in pairs],
        }

    def _drawn(self, *, guided: bool = False) -> NDArray[np.uint8]:
        generation = self.ws.generation.without_guidance() if guided else self.ws.generation
        return generate(self.ws.pipe, self.captions, Split.HELD_OUT.seeds(len(self.captions)), generation)
