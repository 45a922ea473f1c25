"""A cache of training data by itself, without an artefact folder: what `edgeprune cache` does.

The model goes through the same `Original` as when `distill` makes the cache, so both take the same memory and write the
same files.
"""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.resolve import read_original
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.data.cache import INDEX
from edgeprune.data.encode import Made, make_cache, remaining
from edgeprune.data.settings import WORKERS, CacheOptions, is_drawn, most_samples, sample_bytes, settings_of
from edgeprune.residency.compute import Compute
from edgeprune.sampling.generation import Generation
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import halvings
from edgeprune.stages.original import Original
from edgeprune.stages.work import Pace, Subject, Work, drawing, least, reading


class Caching:
    """A cache to make; nothing is loaded before `make`."""

    def __init__(
        self,
        source: Path,
        generation: Generation,
        options: CacheOptions,
        out: Path,
        compute: ComputeOptions,
        variant: str | None = None,
    ) -> None:
        """Check the options.

        Args:
            source: the pipeline's folder.
            generation: size of the images, and how they are drawn if the model draws them.
            options: which samples.
            out: the cache's folder.
            compute: where networks run, in how much memory, and how long at most.
            variant: of the weights, see residency/model_files.py.

        Raises:
            InputError: torch does not find the device; or see `settings_of`.
        """
        self.original = Original(source, variant, Compute.of(compute))
        self.generation, self.options, self.out, self.longest_s = generation, options, out, compute.longest_s
        self.drawn = is_drawn(options.source)
        computed_in = self.original.computed_in(drawing=self.drawn)
        self.settings = settings_of(source, generation, options, variant, computed_in=computed_in)
        config, family = read_original(source)
        self.subject = Subject(source, family, config, generation)

    def check(self, progress: Progress = silent) -> None:
        """Say what the rest takes at least, and refuse it if that is too long or too much memory.

        Args:
            progress: gets the line.

        Raises:
            StaleStageError: the folder holds a cache with other settings.
            InputError: it takes too long, or more memory than was given; or the folder holds something else.
        """
        left = remaining(self.out, self.settings, most_samples(self.options))
        if not left:
            return  # complete, or only known when it is read
        # A cache that was begun keeps its number of samples, and a folder of images is used completely.
        free = "samples" in self.settings and not (self.out / INDEX).is_file()
        ways = [(f"--samples {n}", self._work(n)) for n in halvings(left)] if free else []
        place = next(p for p in (self.out.resolve(), *self.out.resolve().parents) if p.is_dir())
        compute, subject = self.original.compute, self.subject
        of = Memory(subject, compute)
        pace = Pace(subject, compute, self.longest_s, lambda: least(subject, compute, place))
        pace.check(
            "cache", self._work(left), ways, progress,
            memory=of.drawing(1) if self.drawn else of.reading(1),
            written=left * sample_bytes(subject.source, self.generation, half=self.options.half),
        )  # fmt: skip

    def _work(self, samples: int) -> Work:
        return drawing(self.subject, samples) if self.drawn else reading(self.subject, samples)

    def make(self, progress: Progress = silent, *, workers: int = WORKERS) -> Made:
        """Make what is missing of the cache; see `make_cache`.

        Args:
            progress: called after each batch.
            workers: threads that decode and resize images.
        """
        return make_cache(
            lambda: self.original.encoding(drawing=self.drawn), self.subject.source, self.out, self.settings,
            self.generation, self.options, workers=workers,
            progress=lambda done, total, note: progress("cache", done, total, note),
        )  # fmt: skip
