"""GenEval's prompts and verdicts (Ghosh et al., arXiv 2310.11513), of detections alone: no torch, no detector.

The 553 prompts are drawn by the benchmark's published rule (its object list, its order of draws, numpy's generator
seeded with 43), so that no file is copied or fetched. Any text of that form has a meaning, the benchmark's own prompt
file included. What it leaves out: finding objects and naming their colours, see geneval.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError

# COCO's 80 classes in COCO's order, three with a word more than COCO's own name.
NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
"""A detection counts above this score; in the counting task above the second."""
MOST = 16
"""Detections of a class that count, the surest first."""
SLACK = 0.1
"""Share of both objects' sizes that their distance must exceed before one is beside the other."""


@dataclass(frozen=True)
class Wanted:
    """Objects that must be in the image."""

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    """Where they are from the first wanted ones."""


@dataclass(frozen=True)
class Meaning:
    """What a prompt asks for."""

    task: str
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for."""

    text: str
    meaning: Meaning


@dataclass(frozen=True)
class Detection:
    """One object that a detector found."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: NDArray[np.bool_] | None = None
    """(H, W), where the object is."""


# ------------------------------------------------------------------------------------------ prompts


def _plural(name: str) -> str:  # as the benchmark writes it, `benchs` and all
    return name + ("es" if name.endswith("s") else "s")


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def text_of(meaning: Meaning) -> str:
    """The caption of a meaning, in the benchmark's words."""
    if meaning.task == "counting":
        (one,) = meaning.wanted
        number = next(word for word, count in NUMBERS.items() if count == one.count)
        return f"a photo of {number} {_plural(one.name)}"
    phrases = [_with_article(f"{w.color} {w.name}" if w.color else w.name) for w in meaning.wanted]
    if meaning.task == "position":
        return f"a photo of {phrases[1]} {meaning.wanted[1].relation} {phrases[0]}"
    return f"a photo of {' and '.join(phrases)}"


@functools.cache
def _all_prompts(seed: int = 43, draws: int = 100) -> tuple[Prompt, ...]:
    """Every object once, then `draws` of each other task, without what was drawn before. The order of draws matters."""
    rng = np.random.default_rng(seed)
    person, count = NAMES.index("person"), len(NAMES)

    def colorable(index: int) -> str:  # nobody is asked for a red person
        return NAMES[(index + 1 + person) % count]

    def two() -> tuple[str, str]:
        a, b = rng.choice(count, size=2, replace=False)
        return NAMES[a], NAMES[b]

    def two_object() -> tuple[Wanted, ...]:
        return tuple(map(Wanted, two()))

    def counting() -> tuple[Wanted, ...]:
        name = NAMES[rng.choice(count)]
        return (Wanted(name, int(rng.integers(2, 4, endpoint=True))),)

    def colors() -> tuple[Wanted, ...]:
        name = colorable(rng.choice(count - 1))
        return (Wanted(name, color=COLORS[rng.choice(len(COLORS))]),)

    def position() -> tuple[Wanted, ...]:
        moved, target = two()
        return Wanted(target), Wanted(moved, relation=RELATIONS[rng.choice(len(RELATIONS))])

    def color_attr() -> tuple[Wanted, ...]:
        names = [colorable(i) for i in rng.choice(count - 1, size=2, replace=False)]
        shades = [COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False)]
        return tuple(Wanted(n, color=c) for n, c in zip(names, shades, strict=True))

    meanings = [Meaning("single_object", (Wanted(NAMES[i]),)) for i in rng.choice(count, size=count, replace=False)]
    drawn: dict[str, Callable[[], tuple[Wanted, ...]]] = {
        "two_object": two_object, "counting": counting, "colors": colors, "position": position,
        "color_attr": color_attr,
    }  # fmt: skip
    meanings += [Meaning(task, draw()) for task, draw in drawn.items() for _ in range(draws)]
    return tuple(Prompt(text_of(m), m) for m in dict.fromkeys(meanings))


def evaluation_prompts(per_task: int | None = None, *, held_out: bool = True) -> list[Prompt]:
    """The benchmark's 553 prompts, task by task; or the first `per_task` of each task.

    With `held_out` False others of the same kinds, to choose a plan by; single objects are the same ones.
    """
    every: list[Prompt] = list(_all_prompts())
    if not held_out:
        others = _all_prompts(seed=44)
        every = [p for p in others if p.meaning.task == "single_object" or p not in every]
    return [p for task in TASKS for p in [q for q in every if q.meaning.task == task][:per_task]]


@functools.cache
def _singular() -> dict[str, str]:
    return {_plural(name): name for name in NAMES}


def _phrase(text: str) -> Wanted | None:
    """`a red apple` or `an apple`; None for anything else."""
    words = re.sub(r"^an? ", "", text)
    if words in NAMES:  # first, for an orange is a fruit
        return Wanted(words)
    color, _, name = words.partition(" ")
    return Wanted(name, color=color) if color in COLORS and name in NAMES else None


def _meaning(words: str) -> Meaning | None:
    number, _, plural = words.partition(" ")
    if number in NUMBERS and plural in _singular():
        return Meaning("counting", (Wanted(_singular()[plural], NUMBERS[number]),))
    for relation in RELATIONS:
        moved, found, target = (words.partition(f" {relation} ")[i] for i in range(3))
        a, b = _phrase(moved), _phrase(target)
        if found and a and b and not (a.color or b.color):
            return Meaning("position", (b, Wanted(a.name, relation=relation)))
    parts = [_phrase(part) for part in words.split(" and ")]
    wanted = tuple(part for part in parts if part)
    colored = [bool(w.color) for w in wanted]
    if len(wanted) != len(parts) or len(wanted) > 2 or len(set(colored)) != 1:
        return None
    tasks = ("colors", "color_attr") if colored[0] else ("single_object", "two_object")
    return Meaning(tasks[len(wanted) - 1], wanted)


def parse(text: str) -> Meaning:
    """The meaning of a caption of this form.

    Raises:
        InputError: it is not of this form.
    """
    words = " ".join(text.lower().split())
    found = _meaning(words.removeprefix("a photo of ")) if words.startswith("a photo of ") else None
    if found is None:
        raise InputError(
            f"prompt {text!r} is not one of GenEval's (like 'a photo of a red apple and a green bench'); "
            "use another metric"
        )
    return found


# ----------------------------------------------------------------------------------------- verdicts


def counted(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """The detections that count in a task, by class, the surest first."""
    least = COUNTING_CONFIDENCE if task == "counting" else CONFIDENCE
    out: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        if found.score > least and len(out.get(found.name, [])) < MOST:
            out.setdefault(found.name, []).append(found)
    return out


def relations(moved: Detection, target: Detection) -> set[str]:
    """Where one object is from another: none, one or two of RELATIONS.

    The distance of the centres, less a share of both objects' sizes, must be more than half of the whole distance in
    that direction.
    """
    a, b = (np.asarray(d.box).reshape(2, 2) for d in (moved, target))
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    right, down = beyond / np.linalg.norm(offset)
    held = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in held.items() if holds}


def verdict(
    detections: Sequence[Detection],
    meaning: Meaning,
    colors_of: Callable[[Sequence[Detection], str], Sequence[str]],
) -> bool:
    """Whether an image shows what is asked for.

    Colours and positions are judged on the surest detections alone, as many as are wanted.

    Args:
        detections: everything found in the image.
        meaning: what is asked for.
        colors_of: names the colour of each of some detections of a class; asked only where a colour is wanted.
    """
    there: Mapping[str, list[Detection]] = counted(detections, meaning.task)
    groups: list[list[Detection]] = []
    for wanted in meaning.wanted:
        found = there.get(wanted.name, [])
        if len(found) < wanted.count or (meaning.task == "counting" and len(found) > wanted.count):
            return False
        groups.append(found[: wanted.count])
        if wanted.color and list(colors_of(groups[-1], wanted.name)).count(wanted.color) < wanted.count:
            return False
        if wanted.relation and any(wanted.relation not in relations(a, b) for a in groups[-1] for b in groups[0]):
            return False
    return True
