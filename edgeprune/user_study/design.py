"""Which images a rater sees, in which order: blind, randomised, and balanced over raters.

A *condition* is what one trial shows: one variant (mode `mos`) or an unordered pair of variants (mode `pairs`). Raters
get the cells prompt x condition in turn, so after any number of raters the counts of two cells differ by at most one.
For each rater, the conditions follow rows of a Williams square: over all raters, each condition comes equally often at
every place and after every other condition. The design does not adapt to the answers.

Source of the square: E. J. Williams, "Experimental designs balanced for the estimation of residual effects of
treatments", 1949.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json

MODES = ("mos", "pairs")
QUESTIONS = ("quality", "alignment")
"""What the page asks in every trial: how good the image looks, and how well it shows its prompt."""
SCALE = {"mos": (1, 2, 3, 4, 5), "pairs": (-1, 0, 1)}
"""The possible answers: bad to excellent (the five grades of ITU-T P.910), or left, same, right."""
_MOST_TRIALS = 10_000
"""Limit of trials per rater and of prompts: more than anybody answers."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Trial:
    """One screen of the page."""

    prompt: int
    """Its index in `Study.prompts`."""
    shown: tuple[int, ...]
    """Indices of variants: one, or left and right."""
    asked: int | None = None
    """The answer that an attention check asks for in place of the prompt; None in other trials."""


@dataclass(frozen=True)
class Study:
    """The content of `study.json`."""

    id: str
    """16 hex digits, by which a browser recognises the study."""
    title: str
    mode: str
    seed: int
    variants: tuple[str, ...]
    """The first is the original that the others are compared with."""
    prompts: tuple[str, ...]
    files: tuple[str, ...]
    """The original names of the images, without suffix; only the CSV shows them."""
    per_rater: int
    """Trials of one rater, without attention checks."""
    checks: int
    """Attention checks of one rater."""

    def image(self, variant: int, prompt: int) -> str:
        """Return the path of an image inside the study's folder."""
        return f"images/{self.variants[variant]}/{prompt:04}.png"


def conditions(mode: str, variants: int) -> list[tuple[int, ...]]:
    """Return what a trial can show: each variant, or each pair, as indices."""
    return list(itertools.combinations(range(variants), 1 if mode == "mos" else 2))


def check_variant(name: str) -> str:
    """Return the name if a variant can have it.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"variant {name!r}: expected up to 40 letters, digits, '.', '_' and '-'")
    return name


def read(folder: Path) -> Study:
    """Read the study of a folder.

    Raises:
        InputError: the folder holds no study, or a field has a value that `edgeprune study new` never writes.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; begin with: edgeprune study new {folder} --variants NAME=FOLDER ...")
    data = read_json(path)

    def field(name: str, kind: type, fits: Any, expected: str) -> Any:
        value = data.get(name)
        if type(value) is not kind or not fits(value):
            raise InputError(f"{path}: {name}: found {shown(value)}, expected {expected}")
        return value

    def texts(name: str, fits: Any, expected: str) -> tuple[str, ...]:
        return tuple(field(name, list, lambda v: all(isinstance(t, str) for t in v) and fits(v), expected))

    variants = texts("variants", lambda v: 100 >= len(set(v)) == len(v) > 1, "2 to 100 names, no two alike")
    for name in variants:
        check_variant(name)
    prompts = texts("prompts", lambda v: 0 < len(v) <= _MOST_TRIALS, f"a list of up to {_MOST_TRIALS} texts")
    return Study(
        id=field("id", str, _ID.fullmatch, "16 hex digits"),
        title=field("title", str, lambda v: True, "a text"),
        mode=field("mode", str, MODES.__contains__, " or ".join(MODES)),
        seed=field("seed", int, lambda v: abs(v) < 2**63, "a number"),
        variants=variants,
        prompts=prompts,
        files=texts("files", lambda v: len(v) == len(prompts), "as many names as prompts"),
        per_rater=field("per_rater", int, lambda v: 0 < v <= _MOST_TRIALS, f"a number from 1 to {_MOST_TRIALS}"),
        checks=field("checks", int, lambda v: 0 <= v <= _MOST_TRIALS, f"a number up to {_MOST_TRIALS}"),
    )


def williams(count: int) -> list[list[int]]:
    """Return the rows of a Williams square over 0..count-1: `count` rows if that is even, else twice as many."""
    first, low, high = [0], 1, count - 1
    while low <= high:
        first.append(low)
        low += 1
        if low <= high:
            first.append(high)
            high -= 1
    rows = [[(value + shift) % count for value in first] for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def trials(study: Study, rater: int) -> list[Trial]:
    """Return all trials of rater number `rater` (from 0, in order of arrival), with the attention checks."""
    choices, prompts = conditions(study.mode, len(study.variants)), len(study.prompts)
    sides = [_ranks(study, condition) for condition in range(len(choices))]
    shuffle = random.Random(f"{study.seed} {rater}")
    waiting: list[list[Trial]] = [[] for _ in choices]
    for place in range(rater * study.per_rater, (rater + 1) * study.per_rater):
        turn, cell = divmod(place, len(choices) * prompts)
        round_, prompt = divmod(cell, prompts)
        condition = (prompt + round_) % len(choices)
        shown = choices[condition]
        if (turn + sides[condition][prompt]) % 2:  # swap the sides each time a pair comes up again
            shown = shown[::-1]
        waiting[condition].append(Trial(prompt, shown))
    for row in waiting:
        shuffle.shuffle(row)
    square, out = williams(len(choices)), list[Trial]()
    for block in itertools.count(rater):
        for condition in square[block % len(square)]:
            if row := waiting[condition]:
                out.append(row.pop(_farthest(row, out, len(choices))))
        if not any(waiting):
            break
    return _with_checks(study, out, shuffle)


def _farthest(row: list[Trial], out: list[Trial], most: int) -> int:
    """Return the index of the first trial whose prompt was not among the last `most` shown, or else the last fewer.

    A prompt that soon returns invites comparing from memory.
    """
    for width in range(most, 0, -1):
        recent = {trial.prompt for trial in out[-width:]}
        for i, trial in enumerate(row):
            if trial.prompt not in recent:
                return i
    return 0


def _ranks(study: Study, condition: int) -> list[int]:
    """Return a shuffled 0..P-1, the same for every rater, so that half of a condition's prompts have an even rank."""
    ranks = list(range(len(study.prompts)))
    random.Random(f"{study.seed} sides {condition}").shuffle(ranks)
    return ranks


def _with_checks(study: Study, out: list[Trial], shuffle: random.Random) -> list[Trial]:
    """Insert one check at a random place of each of `checks` equal parts, never as the first trial."""
    part = len(out) / max(study.checks, 1)
    for number in reversed(range(study.checks)):
        place = max(1, int(part * (number + shuffle.uniform(0.2, 1))))
        model, asked = shuffle.choice(out), shuffle.choice([s for s in SCALE[study.mode] if s])
        out.insert(place, Trial(model.prompt, model.shown, asked))
    return out
