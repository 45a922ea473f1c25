"""Which images a rater sees, in which order: blind, randomised, and balanced over raters.

A *condition* is what one trial shows: one variant (mode `mos`) or an unordered pair of them (mode `pairs`). The cells
prompt x condition are dealt out in turn, so that after any number of raters no cell was shown more than once more than
another. Within a rater conditions follow the rows of a Williams square: over raters each comes at every place, and
after every other one, equally often. What it leaves out: adapting to the answers.

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
"""What is asked of every trial: how good the image looks, and how well it shows its prompt."""
SCALE = {"mos": (1, 2, 3, 4, 5), "pairs": (-1, 0, 1)}
"""The answers: bad to excellent (ITU-T P.910's five grades), or left, same, right."""
_MOST_TRIALS = 10_000
"""Of one rater, and prompts: more than anybody answers."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Trial:
    """One screen."""

    prompt: int
    """Its index in `Study.prompts`."""
    shown: tuple[int, ...]
    """Indices of variants: one, or left and right."""
    asked: int | None = None
    """In an attention check: the answer that the screen asks for, instead of showing the prompt."""


@dataclass(frozen=True)
class Study:
    """What `study.json` holds."""

    id: str
    """16 hex digits; a browser knows by it which study its rater is of."""
    title: str
    mode: str
    seed: int
    variants: tuple[str, ...]
    """The first is the original that the others are compared with."""
    prompts: tuple[str, ...]
    files: tuple[str, ...]
    """The images' names where they came from, without suffix; for the CSV only."""
    per_rater: int
    """Trials of one rater, attention checks aside."""
    checks: int
    """Attention checks of one rater."""

    def image(self, variant: int, prompt: int) -> str:
        """Path of an image inside the study's folder."""
        return f"images/{self.variants[variant]}/{prompt:04}.png"


def conditions(mode: str, variants: int) -> list[tuple[int, ...]]:
    """What a trial can show: each variant, or each pair."""
    return list(itertools.combinations(range(variants), 1 if mode == "mos" else 2))


def check_variant(name: str) -> str:
    """The name itself, if it can be one of a variant.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"variant {name!r}: expected up to 40 letters, digits, '.', '_' and '-'")
    return name


def read(folder: Path) -> Study:
    """The study of a folder.

    Raises:
        InputError: no study there, or a field of it cannot be what `edgeprune study new` wrote.
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
    """Rows over 0..count-1: `count` of them if that is even, else twice as many."""
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
    """All that rater number `rater` (from 0, in order of arrival) is shown, attention checks among it."""
    choices, prompts = conditions(study.mode, len(study.variants)), len(study.prompts)
    sides = [_ranks(study, condition) for condition in range(len(choices))]
    shuffle = random.Random(f"{study.seed} {rater}")
    waiting: list[list[Trial]] = [[] for _ in choices]
    for place in range(rater * study.per_rater, (rater + 1) * study.per_rater):
        turn, cell = divmod(place, len(choices) * prompts)
        round_, prompt = divmod(cell, prompts)
        condition = (prompt + round_) % len(choices)
        shown = choices[condition]
        if (turn + sides[condition][prompt]) % 2:  # sides change each time that a pair comes up again
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
    """Index of the first trial whose prompt is not among the last `most` shown, or as many of them as can be avoided.

    The same prompt soon again invites comparing from memory.
    """
    for width in range(most, 0, -1):
        recent = {trial.prompt for trial in out[-width:]}
        for i, trial in enumerate(row):
            if trial.prompt not in recent:
                return i
    return 0


def _ranks(study: Study, condition: int) -> list[int]:
    """A shuffled 0..P-1, the same for every rater: half of the prompts of a condition have even ones."""
    ranks = list(range(len(study.prompts)))
    random.Random(f"{study.seed} sides {condition}").shuffle(ranks)
    return ranks


def _with_checks(study: Study, out: list[Trial], shuffle: random.Random) -> list[Trial]:
    """One check at a random place of each of `checks` equal parts, never first."""
    part = len(out) / max(study.checks, 1)
    for number in reversed(range(study.checks)):
        place = max(1, int(part * (number + shuffle.uniform(0.2, 1))))
        model, asked = shuffle.choice(out), shuffle.choice([s for s in SCALE[study.mode] if s])
        out.insert(place, Trial(model.prompt, model.shown, asked))
    return out
