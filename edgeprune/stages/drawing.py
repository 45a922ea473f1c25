"""Forecasts of `generate`, `score` and `bench` for what torch draws. Other runtimes say the time left as they draw."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.artefact.manifest import INT4
from edgeprune.artefact.resolve import read_config
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress
from edgeprune.planning.plan import PrunePlan
from edgeprune.residency.compute import Compute
from edgeprune.sampling.generation import Generation, GenerationOptions
from edgeprune.stages.costs import sample
from edgeprune.stages.memory import Memory
from edgeprune.stages.work import Pace, Subject, Work, drawing, least


@dataclass(frozen=True)
class Drawn:
    """A model, and what it draws."""

    subject: Subject
    parameters: int
    """Of the transformer, without what is removed of its blocks."""
    images: int = 1
    timed: int = 0
    """Steps besides those of the images, in which guidance acts."""

    @classmethod
    def of(cls, folder: Path, options: GenerationOptions | None = None, *, images: int = 1, timed: int = 0) -> Drawn:
        """Read an artefact's or a diffusers folder.

        Args:
            folder: the folder.
            options: what differs from the folder's own settings.
            images: how many are drawn.
            timed: steps besides.

        Raises:
            InputError: a config or a setting is not usable.
        """
        config, family = read_config(folder)
        generation = Generation.load(folder).changed(options or GenerationOptions(), "options")
        subject, plan = Subject(folder, family, config, generation), folder / "plan.json"
        parameters = PrunePlan.load(plan).after.parameters if plan.is_file() else subject.numbers
        return cls(subject, min(parameters, subject.numbers), images, timed)

    def changed(self, **settings: Any) -> Drawn:
        """Return the same with other settings of the images."""
        generation = replace(self.subject.generation, **settings)
        return replace(self, subject=replace(self.subject, generation=generation))

    def work(self, unit: Subject) -> Work:
        """Return the work, with evaluations of another model and image size."""
        evaluations = self.images * self.subject.per_image + self.timed * self.subject.per_step
        share = self.parameters * _tokens(self.subject) / (unit.numbers * _tokens(unit))
        others = drawing(self.subject, self.images) if self.images else Work()
        return replace(others, evaluations=evaluations * share)

    def memory(self, compute: Compute) -> int:
        """Return the bytes that it takes at least. A rounded block takes less than the VAE."""
        of = Memory(self.subject, compute)
        rounded = (self.subject.source / INT4).is_dir()
        return max(of.encoding(2), of.decoding()) if rounded else of.drawing(1)


def _tokens(subject: Subject) -> int:
    latents, condition, *_ = sample(subject.family, subject.config, subject.source, subject.generation)
    patch = subject.family.latents(subject.config).patch
    return latents.shape[-1] * latents.shape[-2] // patch**2 + condition.hidden.shape[1]


def check(
    command: str,
    drawn: Sequence[Drawn],
    ways: Sequence[tuple[str, Sequence[Drawn]]],
    options: ComputeOptions,
    progress: Progress,
) -> None:
    """Say what a command takes at least, unless it is little, and refuse what is too long or too much memory.

    Args:
        command: its name.
        drawn: one model after the other.
        ways: options that make it shorter, each with what is left.
        options: where torch computes, in how much memory, and how long at most.
        progress: gets the line.

    Raises:
        InputError: see `Pace.check`; or torch does not find the device.
    """
    unit, compute, scratch = drawn[0].subject, Compute.of(options), Path(tempfile.gettempdir())

    def total(some: Sequence[Drawn]) -> Work:
        return sum((one.work(unit) for one in some), Work())

    pace = Pace(unit, compute, options.longest_s, lambda: least(unit, compute, scratch))
    shorter = ((option, total(some)) for option, some in ways)  # counted if something is refused
    needed = max(one.memory(compute) for one in drawn)
    pace.check(command, total(drawn), shorter, progress, memory=needed)
