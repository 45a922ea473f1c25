"""The captions of a world by task: their meanings, the five splits, and the parser.

A hash of a meaning's key decides its split, so two phrasings of one meaning always fall in the same split. A grammar is
closed: `parse` is a dictionary lookup, and an unknown prompt is an error instead of a guess.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split, fraction
from edgeprune.shapes.meaning import Meaning, Prompt

TEMPLATES = ("{}", "a picture of {}", "a drawing of {}")
# Share of the meanings that are not held out in each split, rounded up; training has the rest.
_SHARES = {Split.ANALYSIS: 0.1, Split.CALIBRATION: 0.15, Split.TUNING: 0.1}


@dataclass(frozen=True)
class Task:
    """One kind of caption."""

    name: str
    captions: Callable[[], Iterable[Prompt]]
    """Yields every meaning with its plain caption (no template)."""
    held_out: float = 0.2
    """Share of the meanings that no training sees; smaller tasks hold out more."""
    weight: float = 1.0
    """How often a training scene is of this task; tasks that are hard to learn weigh more."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """All captions of a world."""

    tasks: tuple[Task, ...]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    def prompts(self, task: str | None = None) -> tuple[Prompt, ...]:
        """Return every meaning with its plain caption (no template), for one task or for all.

        Raises:
            InputError: there is no such task.
        """
        if task is None:
            return tuple(p for found in self._prompts.values() for p in found)
        if task not in self._prompts:
            raise InputError(f"task: found {task!r}, expected one of {', '.join(self.names)}")
        return self._prompts[task]

    def split(self, meaning: Meaning) -> Split:
        """Return the split of every caption that has this meaning."""
        return Split.HELD_OUT if self._held_out(meaning) else self._splits[meaning.key]

    def prompts_of(self, task: str, *splits: Split) -> list[Prompt]:
        """Return a task's prompts whose meanings belong to one of these splits, as plain captions."""
        self.prompts(task)  # raises if there is no such task
        return [prompt for prompt, split in self._by_split[task] if split in splits]

    def evaluation_prompts(self, per_task: int = 30, *, split: Split = Split.HELD_OUT, seed: int = 0) -> list[Prompt]:
        """Return up to `per_task` distinct captions of each task, task by task.

        Templates add captions to tasks with few meanings; a split other than training may still have fewer.
        """
        out: list[Prompt] = []
        for index, task in enumerate(self.names):
            plain = self.prompts_of(task, split)
            order = np.random.default_rng([seed, index]).permutation(len(plain))
            ordered = [Prompt(t.format(plain[i].text), plain[i].meaning) for t in TEMPLATES for i in order]
            out += ordered[:per_task]
        return out

    def parse(self, text: str) -> Meaning:
        """Return the meaning of a caption of this grammar.

        Raises:
            InputError: the caption is not in the grammar.
        """
        meaning = self._by_text.get(" ".join(text.lower().split()))
        if meaning is None:
            raise InputError(
                f"prompt {text!r} is not a caption of shapes world (like 'two red circles'); use another metric"
            )
        return meaning

    @functools.cached_property
    def _prompts(self) -> dict[str, tuple[Prompt, ...]]:
        return {task.name: tuple(task.captions()) for task in self.tasks}

    @functools.cached_property
    def _by_split(self) -> dict[str, list[tuple[Prompt, Split]]]:
        """The prompts of each task with their splits."""
        return {task: [(p, self.split(p.meaning)) for p in found] for task, found in self._prompts.items()}

    @functools.cached_property
    def _by_text(self) -> dict[str, Meaning]:
        """The meaning of every caption, in lower case."""
        return {t.format(p.text).lower(): p.meaning for p in self.prompts() for t in TEMPLATES}

    @functools.cached_property
    def _shares(self) -> dict[str, float]:
        return {task.name: task.held_out for task in self.tasks}

    def _held_out(self, meaning: Meaning) -> bool:
        share = self._shares[meaning.task]
        return int.from_bytes(hashlib.sha256(meaning.key.encode()).digest()[:4], "big") / 2**32 < share

    @functools.cached_property
    def _splits(self) -> dict[str, Split]:
        """The split of every meaning that is not held out, by its key.

        A task's shares are of the ranks of hashes, not of the hashes themselves, so that small tasks are in every split
        too. A few meanings belong to two tasks ("one red circle", "a red circle"); the smaller task decides.
        """
        out: dict[str, Split] = {}
        for task in sorted(self.names, key=lambda task: len(self.prompts(task))):
            keys = {p.meaning.key for p in self.prompts(task) if not self._held_out(p.meaning)} - out.keys()
            left = sorted(keys, key=lambda key: fraction(f"split {key}"))
            for name, share in _SHARES.items():
                count = math.ceil(share * len(keys))
                out |= dict.fromkeys(left[:count], name)
                left = left[count:]
            out |= dict.fromkeys(left, Split.TRAINING)
        return out


def article(word: str) -> str:
    """Return `a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"


def plural(count: int, shape: str) -> str:
    """Return the name of a shape, in the plural unless `count` is 1."""
    return shape + ("" if count == 1 else "es" if shape.endswith("s") else "s")
