"""The captions of shapes world: what each one means, the five splits, and the parser.

A `Meaning` is what a prompt asks for. A hash of its key decides its split, so two phrasings of one meaning always fall
in the same split. The built-in model was trained on every split but the held-out one; whatever compresses it uses each
split for one purpose. The grammar is closed: `parse` is a dictionary lookup, and an unknown prompt is an error instead
of a guess.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split, fraction

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "green": (34, 150, 58),
    "blue": (36, 74, 206),
    "yellow": (246, 212, 22),
    "orange": (248, 132, 12),
    "purple": (136, 40, 168),
    "cyan": (40, 198, 214),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
GLYPHS = "ACEHKLMRTX234579"
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
RELATIONS = ("to the left of", "to the right of", "above", "below")
NUMBERS = ("one", "two", "three", "four")
TASKS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution", "typography")
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}")

# Share of each task's meanings that training never sees; smaller tasks hold out more.
_HELD_OUT = {"single_object": 0.25, "two_objects": 0.4, "color_attribution": 0.1}
_HELD_OUT_DEFAULT = 0.2
# Share of the other meanings in each split, rounded up; distillation trains on the rest.
_SHARES = {Split.ANALYSIS: 0.1, Split.CALIBRATION: 0.15, Split.TUNING: 0.1}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; the renderer chooses what a None field leaves open."""

    shape: str
    """A name from SHAPES, or one character from GLYPHS."""
    colour: str | None = None
    size: str | None = None
    """`small`, `large` or None."""


@dataclass(frozen=True)
class Meaning:
    """What a prompt asks for, as data."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None
    """Where things[0] is relative to things[1], from RELATIONS."""
    place: str | None = None
    """Where the only object is, from PLACES."""

    @property
    def key(self) -> str:
        """Return the same text for every phrasing of a scene ("A above B" equals "B below A")."""
        things, relation = self.things, self.relation
        if relation in ("to the right of", "below"):
            things = things[::-1]
            relation = {"to the right of": "to the left of", "below": "above"}[relation]
        elif relation is None:
            things = tuple(sorted(things, key=repr))
        return repr((things, relation, self.place))

    @property
    def held_out(self) -> bool:
        """Return True if no training caption has this meaning."""
        share = _HELD_OUT.get(self.task, _HELD_OUT_DEFAULT)
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") / 2**32 < share

    @property
    def split(self) -> Split:
        """Return the split of every caption that has this meaning."""
        return Split.HELD_OUT if self.held_out else _splits()[self.key]


@dataclass(frozen=True)
class Prompt:
    """A caption and what it means."""

    text: str
    meaning: Meaning


@functools.cache
def prompts(task: str | None = None) -> tuple[Prompt, ...]:
    """Return every meaning with its plain caption (no template), for one task or for all.

    Raises:
        InputError: there is no such task.
    """
    if task is None:
        return tuple(p for t in TASKS for p in prompts(t))
    out: list[Prompt] = []

    def add(text: str, *things: Thing, relation: str | None = None, place: str | None = None) -> None:
        out.append(Prompt(text, Meaning(task, things, relation, place)))

    if task == "single_object":
        for size, shape, place in itertools.product(("small", "large"), SHAPES, PLACES):
            add(f"a {size} {shape} in the {place}", Thing(shape, None, size), place=place)
    elif task == "two_objects":
        for a, b in itertools.permutations(SHAPES, 2):
            add(f"a {a} and a {b}", Thing(a), Thing(b))
    elif task == "counting":
        for n, colour, shape in itertools.product(range(1, 5), COLOURS, SHAPES):
            plural = "" if n == 1 else "es" if shape.endswith("s") else "s"
            add(f"{NUMBERS[n - 1]} {colour} {shape}{plural}", *[Thing(shape, colour)] * n)
    elif task == "colors":
        for colour, shape in itertools.product(COLOURS, SHAPES):
            add(f"{_article(colour)} {colour} {shape}", Thing(shape, colour))
    elif task == "position":
        for relation, (a, b) in itertools.product(RELATIONS, itertools.permutations(SHAPES, 2)):
            add(f"a {a} {relation} a {b}", Thing(a), Thing(b), relation=relation)
    elif task == "color_attribution":
        for (a, b), (p, q) in itertools.product(itertools.permutations(SHAPES, 2), itertools.permutations(COLOURS, 2)):
            add(f"{_article(p)} {p} {a} and {_article(q)} {q} {b}", Thing(a, p), Thing(b, q))
    elif task == "typography":
        for glyph, colour in itertools.product(GLYPHS, COLOURS):
            kind = "digit" if glyph.isdigit() else "letter"
            add(f"the {kind} {glyph} in {colour}", Thing(glyph, colour))
    else:
        raise InputError(f"task: found {task!r}, expected one of {', '.join(TASKS)}")
    return tuple(out)


def _article(word: str) -> str:
    """Return `a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"


@functools.cache
def _splits() -> dict[str, Split]:
    """Return the split of every meaning that is not held out, by its key.

    A task's shares are of the ranks of hashes, not of the hashes themselves, so that small tasks are in every split
    too. A few meanings belong to two tasks ("one red circle", "a red circle"); the smaller task decides.
    """
    out: dict[str, Split] = {}
    for task in sorted(TASKS, key=lambda task: len(prompts(task))):
        keys = {p.meaning.key for p in prompts(task) if not p.meaning.held_out} - out.keys()
        left = sorted(keys, key=lambda key: fraction(f"split {key}"))
        for name, share in _SHARES.items():
            count = math.ceil(share * len(keys))
            out |= dict.fromkeys(left[:count], name)
            left = left[count:]
        out |= dict.fromkeys(left, Split.TRAINING)
    return out


def prompts_of(task: str, *splits: Split) -> list[Prompt]:
    """Return a task's prompts whose meanings belong to one of these splits, as plain captions."""
    return [p for p in prompts(task) if p.meaning.split in splits]


def evaluation_prompts(per_task: int = 30, *, split: Split = Split.HELD_OUT, seed: int = 0) -> list[Prompt]:
    """Return up to `per_task` distinct captions of each task, task by task.

    Templates add captions to tasks with few meanings; of two objects, a split other than training may still have fewer.
    """
    out: list[Prompt] = []
    for task in TASKS:
        plain = prompts_of(task, split)
        order = np.random.default_rng([seed, TASKS.index(task)]).permutation(len(plain))
        ordered = [Prompt(t.format(plain[i].text), plain[i].meaning) for t in TEMPLATES for i in order]
        out += ordered[:per_task]
    return out


@functools.cache
def _by_text() -> dict[str, Meaning]:
    """Return the meaning of every caption, in lower case."""
    return {t.format(p.text).lower(): p.meaning for p in prompts() for t in TEMPLATES}


def parse(text: str) -> Meaning:
    """Return the meaning of a caption of this grammar.

    Raises:
        InputError: the caption is not in the grammar.
    """
    meaning = _by_text().get(" ".join(text.lower().split()))
    if meaning is None:
        raise InputError(
            f"prompt {text!r} is not a caption of shapes world (like 'two red circles'); use another metric"
        )
    return meaning
