"""The rich world, which the other teachers draw: 128 x 128 pixels, textures, up to six things, two words.

The teachers were trained on the training split alone. Tasks with too many meanings to list have a random selection of
them, always the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from edgeprune.shapes.figures import COLOURS, SHAPES, TEXTURES
from edgeprune.shapes.grammar import Grammar, Task, article, plural
from edgeprune.shapes.layout import Layout, compass
from edgeprune.shapes.meaning import PLACES, RELATIONS, Meaning, Prompt, Thing
from edgeprune.shapes.rich_reader import WORDS, see
from edgeprune.shapes.world import World

NUMBERS = ("one", "two", "three", "four", "five", "six")
_PATTERNS = {"striped": "stripes", "dotted": "dots", "checked": "checks"}
_SELECTED = 4000
"""Meanings of a task that has more."""


def _single_object() -> Iterator[Prompt]:
    for size, texture, shape, place in itertools.product(("small", "large"), (None, *TEXTURES), SHAPES, PLACES):
        words = " ".join(filter(None, (size, texture, shape)))
        meaning = Meaning("single_object", (Thing(shape, None, size, texture),), place=place)
        yield Prompt(f"a {words} in the {place}", meaning)


def _two_objects() -> Iterator[Prompt]:
    for (a, b), (p, q) in itertools.product(
        itertools.permutations(SHAPES, 2), itertools.product((None, *TEXTURES), repeat=2)
    ):
        things = Thing(a, texture=p), Thing(b, texture=q)
        yield Prompt(_listed([f"a {p or 'plain'} {a}", f"a {q or 'plain'} {b}"]), Meaning("two_objects", things))


def _several(task: str, count: int) -> Iterator[Prompt]:
    """Yield captions of `count` things that differ in shape and in colour."""
    rng = np.random.default_rng(count)
    for _ in range(_SELECTED):
        things = tuple(map(Thing, _some(rng, SHAPES, count), _some(rng, list(COLOURS), count)))
        yield Prompt(_listed([f"{article(str(t.colour))} {t.colour} {t.shape}" for t in things]), Meaning(task, things))


def _three_objects() -> Iterator[Prompt]:
    return _distinct(_several("three_objects", 3))


def _four_objects() -> Iterator[Prompt]:
    return _distinct(_several("four_objects", 4))


def _counting() -> Iterator[Prompt]:
    for n, colour, shape in itertools.product(range(1, len(NUMBERS) + 1), COLOURS, SHAPES):
        text = f"{NUMBERS[n - 1]} {colour} {plural(n, shape)}"
        yield Prompt(text, Meaning("counting", (Thing(shape, colour),) * n))


def _colors() -> Iterator[Prompt]:
    for (p, q), texture, shape in itertools.product(itertools.permutations(COLOURS, 2), TEXTURES, SHAPES):
        thing = Thing(shape, p, texture=texture, second=q)
        yield Prompt(_two_coloured(thing), Meaning("colors", (thing,)))


def _position() -> Iterator[Prompt]:
    for relation, (a, b), (p, q) in itertools.product(
        RELATIONS, itertools.permutations(SHAPES, 2), itertools.product(("small", "large"), repeat=2)
    ):
        things = Thing(a, size=p), Thing(b, size=q)
        yield Prompt(f"a {p} {a} {relation} a {q} {b}", Meaning("position", things, relation))


def _attributed() -> Iterator[Prompt]:
    rng = np.random.default_rng(2)
    for _ in range(_SELECTED):
        (a, b), (p, q, r, s) = _some(rng, SHAPES, 2), _some(rng, list(COLOURS), 4)
        u, v = (str(rng.choice(TEXTURES)) for _ in range(2))
        things = Thing(a, p, texture=u, second=q), Thing(b, r, texture=v, second=s)
        yield Prompt(_listed([_two_coloured(thing) for thing in things]), Meaning("color_attribution", things))


def _color_attribution() -> Iterator[Prompt]:
    return _distinct(_attributed())


def _typography() -> Iterator[Prompt]:
    for (a, b), (p, q) in itertools.product(itertools.permutations(WORDS, 2), itertools.permutations(COLOURS, 2)):
        text = f"the word {a} in {p} above the word {b} in {q}"
        yield Prompt(text, Meaning("typography", (Thing(a, p), Thing(b, q)), "above"))


def _some(rng: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    """Draw different names."""
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _distinct(prompts: Iterator[Prompt]) -> Iterator[Prompt]:
    """Leave out repeated captions."""
    return iter({prompt.text: prompt for prompt in prompts}.values())


def _listed(parts: Sequence[str]) -> str:
    """Join parts as in "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _two_coloured(thing: Thing) -> str:
    """Return words like "a red circle with blue stripes"."""
    assert thing.colour and thing.texture
    return f"{article(thing.colour)} {thing.colour} {thing.shape} with {thing.second} {_PATTERNS[thing.texture]}"


def _extent(meaning: Meaning, thing: Thing) -> tuple[int, int]:
    """Return the least and the greatest longer side of a thing in pixels; of a word, its height."""
    few = len(meaning.things) < 3
    return {
        "single_object": (32, 38) if thing.size == "small" else (56, 64),
        "counting": (32, 44) if few else (30, 38) if len(meaning.things) < 5 else (24, 30),
        "colors": (44, 64),
        "position": (26, 32) if thing.size == "small" else (46, 52),
        "typography": (28, 32),
        "three_objects": (30, 40),
        "four_objects": (30, 40),
    }.get(meaning.task, (40, 50))


_NEAR, _MIDDLE, _FAR = 34, 64, 94
_ROW = (22, 64, 106)

RICH = World(
    name="rich",
    grammar=Grammar(
        (
            Task("single_object", _single_object, weight=0.7),
            Task("two_objects", _two_objects, weight=1.5),
            Task("three_objects", _three_objects, held_out=0.1, weight=2.0),
            Task("four_objects", _four_objects, held_out=0.1, weight=2.0),
            Task("counting", _counting, weight=2.0),
            Task("colors", _colors, held_out=0.1),
            Task("position", _position, weight=2.0),
            Task("color_attribution", _color_attribution, held_out=0.1, weight=2.5),
            Task("typography", _typography, held_out=0.1),
        )
    ),
    layout=Layout(
        size=128,
        margin=4,
        gap=6,
        jitter=5,
        wobble=8,
        near=13,
        large=42,
        extent=_extent,
        centres={
            2: ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
            3: ((_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _MIDDLE)),
            4: ((_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _NEAR), (_FAR, _FAR)),
            5: (*((42, x) for x in _ROW), (86, 43), (86, 85)),
            6: (*((42, x) for x in _ROW), *((86, x) for x in _ROW)),
        },
        pairs=compass(_NEAR, _MIDDLE, _FAR),
    ),
    see=see,
)
