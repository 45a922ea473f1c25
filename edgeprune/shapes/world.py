"""A world of scenes as data: its grammar, its layout, and how its images are read; drawing and judging with them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.intervals import Interval, mean_interval
from edgeprune.common.splits import Split
from edgeprune.shapes.figures import BACKGROUND, COLOURS, Ink, Pixels, glyph_of, ink_of, texture_of, word_of
from edgeprune.shapes.grammar import Grammar
from edgeprune.shapes.layout import Layout, relation_of
from edgeprune.shapes.meaning import Meaning, Thing
from edgeprune.shapes.reading import Seen

TYPOGRAPHY = "typography"
"""The task whose things are characters or words."""


class Reader(Protocol):
    """Finds the objects of an image from its pixels alone."""

    def __call__(self, pixels: Pixels, *, glyphs: bool = False) -> list[Seen]:
        """Return the objects of an image; if `glyphs`, its characters or words."""


@dataclass(frozen=True, eq=False)
class World:
    """Captioned scenes, and a checker that reads them back."""

    name: str
    grammar: Grammar
    layout: Layout
    see: Reader

    @property
    def size(self) -> int:
        """Side of a scene in pixels."""
        return self.layout.size

    def render(self, meaning: Meaning, rng: np.random.Generator) -> Pixels:
        """Draw one random scene that satisfies `meaning`: (size, size, 3)."""
        canvas = np.empty((self.size, self.size, 3), np.float32)
        canvas[:] = BACKGROUND
        extents = [self._extent(meaning, thing, rng) for thing in meaning.things]
        inks = [_ink(meaning, thing, extent) for thing, extent in zip(meaning.things, extents, strict=True)]
        corners = self.layout.corners(meaning, [(ink.shape[0], ink.shape[1]) for ink in inks], rng)
        for thing, extent, ink, (y, x) in zip(meaning.things, extents, inks, corners, strict=True):
            h, w = ink.shape
            patch = canvas[y : y + h, x : x + w]
            patch += ink[..., None] * (_paint(thing, extent, rng) - patch)
        return canvas.round().astype(np.uint8)

    def _extent(self, meaning: Meaning, thing: Thing, rng: np.random.Generator) -> int:
        """Draw the longer side of a thing in pixels."""
        low, high = self.layout.extent(meaning, thing)
        return int(rng.integers(low, high + 1))

    def training_scenes(
        self, count: int, seed: int | Sequence[int], splits: Sequence[Split] = (Split.TRAINING,)
    ) -> tuple[NDArray[np.uint8], list[str]]:
        """Return scenes (count, size, size, 3) and their plain captions, whose meanings are of these splits."""
        rng = np.random.default_rng(seed)
        pools = [self.grammar.prompts_of(task, *splits) for task in self.grammar.names]
        weights = np.asarray([task.weight for task in self.grammar.tasks])
        tasks = rng.choice(len(pools), size=count, p=weights / weights.sum())
        picked = [pools[t][rng.integers(len(pools[t]))] for t in tasks]
        return np.stack([self.render(p.meaning, rng) for p in picked]), [p.text for p in picked]

    def check(self, pixels: Pixels, meaning: Meaning) -> bool:
        """Return True if an image, (size, size, 3), shows exactly what `meaning` asks for and nothing else."""
        seen = self.see(pixels, glyphs=meaning.task == TYPOGRAPHY)
        if len(seen) != len(meaning.things):
            return False
        if any(
            all(self._fits(s, t) for s, t in zip(order, meaning.things, strict=True))
            for order in itertools.permutations(seen)
        ):
            return self._placed(seen, meaning)
        return False

    def _fits(self, seen: Seen, thing: Thing) -> bool:
        """Return True if an object has a thing's shape, colours, texture and size."""
        extent = max(seen.box[2] - seen.box[0], seen.box[3] - seen.box[1])
        return (
            seen.shape == thing.shape
            and (seen.colour == thing.colour if thing.colour else seen.colour is not None)
            and seen.texture == thing.texture
            and (thing.second is None or seen.second == thing.second)
            and (thing.size is None or (thing.size == "large") == (extent >= self.layout.large))
        )

    def _placed(self, seen: list[Seen], meaning: Meaning) -> bool:
        """Return True if the objects stand where `meaning` asks for them."""
        if meaning.relation:
            first, second = (next(s for s in seen if s.shape == t.shape) for t in meaning.things)
            return relation_of(first.box, second.box, margin=0.0) == meaning.relation
        return meaning.place is None or self.layout.place_of(seen[0].box) == meaning.place

    def task_means(self, values: NDArray[np.float64], tasks: Sequence[str]) -> dict[str, float]:
        """Average the per-prompt values by task, in the order of the grammar."""
        names = np.asarray(tasks)
        return {t: float(values[names == t].mean()) for t in self.grammar.names if t in Counter(tasks)}


def _ink(meaning: Meaning, thing: Thing, extent: int) -> Ink:
    """Draw a thing in one colour: (h, w)."""
    if meaning.task != TYPOGRAPHY:
        return ink_of(thing.shape, extent)
    return glyph_of(thing.shape, extent) if len(thing.shape) == 1 else word_of(thing.shape, extent)


def _paint(thing: Thing, extent: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the colours of a thing's pixels, (3,), or (extent, extent, 3) with a texture; open ones are drawn."""
    first = thing.colour or str(rng.choice(list(COLOURS)))
    paint = np.asarray(COLOURS[first], np.float32)
    if thing.texture is None:
        return paint
    second = thing.second or str(rng.choice([name for name in COLOURS if name != first]))
    return paint + texture_of(thing.texture, extent)[..., None] * (np.asarray(COLOURS[second], np.float32) - paint)


def score(values: NDArray[np.float64], tasks: list[str]) -> Interval:
    """Average over tasks, with a bootstrap 95 % interval over prompts within each task.

    Args:
        values: share of satisfied images per prompt, (P,).
        tasks: the task of each prompt.
    """
    return mean_interval(values, tasks)
