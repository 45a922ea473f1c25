"""Draws with settings that are tried, scores the images, and keeps the figures for a run that resumes.

The reference-based measure is PSNR to the exact solution of the same noise: settings are as good as the folder's own if
they are as close to it. The reference-free one is a metric of the images alone, where there is one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune import metrics, runtimes
from edgeprune.common.files import digest, read_json, write_json
from edgeprune.common.intervals import Interval, mean_interval, paired_drop
from edgeprune.common.progress import Progress
from edgeprune.data.imagefolder import Sample, read_samples
from edgeprune.metrics import scoring
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import World
from edgeprune.tuning.bounds import Bounds
from edgeprune.tuning.search import Costs, exact, fewest

PAIRED = "psnr"
_FAST_S = 5.0
"""An image of one step that takes less is timed again in a batch, as images are drawn."""
_GUESS = 0.4
"""Share of the own evaluations that the forecast takes to be enough."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried. Intervals are 95 %, over prompts; drops are against the folder's own settings."""

    generation: Generation
    evaluations: int
    """Of the transformer, for an image."""
    psnr: Interval
    """To the exact solution, in dB."""
    psnr_drop: Interval
    score: Interval | None
    """Of the reference-free metric; None without one."""
    score_drop: Interval | None
    """As a share of the own score; None without the metric, or where that score is 0."""
    good: bool
    """Whether both drops are within the bounds."""

    @property
    def name(self) -> str:
        """The settings in a few words."""
        low, high = self.generation.guidance_range
        guidance = "" if (low, high) == (0, 1) else f", guidance at {low:g} to {high:g}"
        return f"{self.generation.solver}, {self.generation.num_inference_steps} steps{guidance}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump."""
        return vars(self) | {"generation": self.generation.to_json()}


@dataclass
class Trials:
    """The trials on a folder."""

    folder: Path
    costs: Costs
    wanted: Sequence[scoring.Wish]
    """Prompts and seeds of the images."""
    metric: str | None
    """The reference-free metric."""
    weights: Mapping[str, str]
    """The metric's weights."""
    world: World | None
    """That the folder draws."""
    bounds: Bounds
    runtime: str
    loading: Mapping[str, Any]
    """Options of `runtimes.load`."""
    cache: Path
    """Keeps what was drawn and scored."""
    progress: Progress
    done: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        place = self.loading.get("device")
        identity = [scoring.identity(self.folder), self.runtime, place, self.metric, dict(self.weights)]
        key = digest([identity, [vars(wish) for wish in self.wanted]])[:16]
        self._images, self._path = self.cache / key, self.cache / f"{key}.json"
        self._figures: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}

    @property
    def own(self) -> Generation:
        """The folder's settings."""
        return self.costs.settings.generation

    def choose(self) -> Generation:
        """Return the good settings with the fewest evaluations; images are drawn on the way."""
        self.trial(self.own)
        guided, cost = self.costs.guided, self.costs.evaluations
        best = fewest(self.own, guided=guided, cost=cost, good=lambda one: self.trial(one).good)
        shutil.rmtree(self._images, ignore_errors=True)
        return best

    def trial(self, generation: Generation) -> Trial:
        """Draw and score settings, unless that was done before."""
        key = _key(generation)
        if key not in self._figures:
            self._figures[key] = self._measure(generation)
            write_json(self._path, self._figures)
        own, found = self._figures[_key(self.own)], self._figures[key]
        texts = list(dict.fromkeys(wish.text for wish in self.wanted))
        own_prompts = metrics.tasks_of(self.metric, self.world) if self.metric else None
        tasks = [own_prompts.parse(text).task for text in texts] if own_prompts else None
        drop = paired_drop(own[PAIRED], found[PAIRED]).difference
        score = score_drop = None
        if self.metric:
            score, score_drop = mean_interval(found["score"], tasks), self._lost(own["score"], found["score"], tasks)
        within = [_within(drop, self.bounds.psnr_db), score_drop is None or _within(score_drop, self.bounds.score)]
        trial = Trial(
            generation=generation, evaluations=self.costs.evaluations(generation), psnr=mean_interval(found[PAIRED]),
            psnr_drop=drop, score=score, score_drop=score_drop, good=all(within),
        )  # fmt: skip
        self.done.append(trial)
        kept = "" if generation == self.own else ", within the bounds" if trial.good else ", beyond the bounds"
        self.progress(f"tune: {trial.name}: {trial.evaluations} evaluations, PSNR {trial.psnr.mean:.1f} dB{kept}")
        return trial

    def _lost(self, own: list[float], found: list[float], tasks: Sequence[str] | None) -> Interval | None:
        """Return the drop of the score as a share of the own one, whichever way the metric counts."""
        relative = paired_drop(own, found, tasks).relative
        if relative is None or self.metric is None or not metrics.KNOWN[self.metric].lower_is_better:
            return relative
        low, high = (None if end is None else -end for end in (relative.high, relative.low))
        return Interval(-relative.mean, low, high)

    def _measure(self, generation: Generation) -> dict[str, Any]:
        reference = self._drawn(exact(self.own), "exact")
        name = digest(_key(generation))[:16]
        samples = self._drawn(generation, name)
        (paired,) = scoring.score(samples, [PAIRED], against=reference, progress=self.progress)
        figures: dict[str, Any] = {PAIRED: paired.values}
        if self.metric:
            (alone,) = scoring.score(
                samples, [self.metric], weights=self.weights, world=self.world,
                device=self.loading.get("device", "auto"), progress=self.progress,
            )  # fmt: skip
            figures["score"] = alone.values
        shutil.rmtree(self._images / name)
        return figures

    def _drawn(self, generation: Generation, name: str) -> list[Sample]:
        settings: dict[str, Any] = {"solver": generation.solver}
        if self.costs.guided:
            settings["guidance_range"] = generation.guidance_range
        scoring.draw(
            self.folder, self._images / name, self.wanted, runtime=self.runtime, steps=generation.num_inference_steps,
            settings=settings, loading=self.loading, progress=self.progress,
        )  # fmt: skip
        return read_samples(self._images / name)

    def evaluations(self) -> int:
        """Return about how many evaluations of the transformer the search takes, of images that are not scored yet."""
        own, tried = self.own, list[Generation]()

        def good(generation: Generation) -> bool:
            tried.append(generation)
            return self.costs.evaluations(generation) >= _GUESS * self.costs.evaluations(own)

        fewest(own, guided=self.costs.guided, cost=self.costs.evaluations, good=good)
        left = [one for one in (own, *dict.fromkeys(tried)) if _key(one) not in self._figures]
        return len(self.wanted) * sum(map(self.costs.evaluations, [exact(own), *left] if left else []))

    def seconds(self) -> float:
        """Time an evaluation of one sample as images are drawn; a slow model is timed with a single image."""
        steps = 2 if self.costs.scheduler.shift_terminal else 1  # one alone would end where it begins
        shortest = replace(self.own, num_inference_steps=steps)
        with runtimes.load(self.folder, self.runtime, **self.loading) as opened:

            def one(images: int) -> float:
                began = time.perf_counter()
                texts = [wish.text for wish in self.wanted[:images]]
                opened.generate_latents(texts, steps=steps)
                return (time.perf_counter() - began) / len(texts) / self.costs.evaluations(shortest)

            first = one(1)
            return first if first > _FAST_S else min(one(scoring.BATCH), one(scoring.BATCH))


def _key(generation: Generation) -> str:
    low, high = generation.guidance_range
    return f"{generation.solver} {generation.num_inference_steps} {low:g}:{high:g}"


def _within(drop: Interval, bound: float) -> bool:
    """Return whether a drop is within its bound: its upper end, or of one prompt the drop itself."""
    return (drop.mean if drop.high is None else drop.high) <= bound
