"""The plain world, which the built-in model draws: 64 x 64 pixels, six plain shapes, and single characters.

Its captions, splits and scenes are those that the model's weights were trained and judged on. The model was trained on
every split but the held-out one; whatever compresses it uses each split for one purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from edgeprune.common.splits import Split
from edgeprune.shapes.figures import COLOURS, SHAPES
from edgeprune.shapes.grammar import Grammar, Task, article, plural
from edgeprune.shapes.layout import Layout, compass
from edgeprune.shapes.meaning import PLACES, RELATIONS, Meaning, Prompt, Thing
from edgeprune.shapes.plain_reader import GLYPHS, see
from edgeprune.shapes.world import World

NUMBERS = ("one", "two", "three", "four")
SEEN = tuple(split for split in Split if split is not Split.HELD_OUT)
"""The splits that the built-in model was trained on."""


def _single_object() -> Iterator[Prompt]:
    for size, shape, place in itertools.product(("small", "large"), SHAPES, PLACES):
        things = (Thing(shape, None, size),)
        yield Prompt(f"a {size} {shape} in the {place}", Meaning("single_object", things, place=place))


def _two_objects() -> Iterator[Prompt]:
    for a, b in itertools.permutations(SHAPES, 2):
        yield Prompt(f"a {a} and a {b}", Meaning("two_objects", (Thing(a), Thing(b))))


def _counting() -> Iterator[Prompt]:
    for n, colour, shape in itertools.product(range(1, len(NUMBERS) + 1), COLOURS, SHAPES):
        text = f"{NUMBERS[n - 1]} {colour} {plural(n, shape)}"
        yield Prompt(text, Meaning("counting", (Thing(shape, colour),) * n))


def _colors() -> Iterator[Prompt]:
    for colour, shape in itertools.product(COLOURS, SHAPES):
        yield Prompt(f"{article(colour)} {colour} {shape}", Meaning("colors", (Thing(shape, colour),)))


def _position() -> Iterator[Prompt]:
    for relation, (a, b) in itertools.product(RELATIONS, itertools.permutations(SHAPES, 2)):
        yield Prompt(f"a {a} {relation} a {b}", Meaning("position", (Thing(a), Thing(b)), relation))


def _color_attribution() -> Iterator[Prompt]:
    for (a, b), (p, q) in itertools.product(itertools.permutations(SHAPES, 2), itertools.permutations(COLOURS, 2)):
        text = f"{article(p)} {p} {a} and {article(q)} {q} {b}"
        yield Prompt(text, Meaning("color_attribution", (Thing(a, p), Thing(b, q))))


def _typography() -> Iterator[Prompt]:
    for glyph, colour in itertools.product(GLYPHS, COLOURS):
        kind = "digit" if glyph.isdigit() else "letter"
        yield Prompt(f"the {kind} {glyph} in {colour}", Meaning("typography", (Thing(glyph, colour),)))


def _extent(meaning: Meaning, thing: Thing) -> tuple[int, int]:
    """Return the least and the greatest longer side of a thing in pixels."""
    return {
        "single_object": (14, 17) if thing.size == "small" else (28, 32),
        "counting": (16, 20) if len(meaning.things) > 2 else (16, 24),
        "colors": (20, 34),
        "typography": (34, 40),
    }.get(meaning.task, (18, 25))


_NEAR, _MIDDLE, _FAR = 17, 32, 47

PLAIN = World(
    name="plain",
    grammar=Grammar(
        (
            Task("single_object", _single_object, held_out=0.25, weight=0.7),
            Task("two_objects", _two_objects, held_out=0.4, weight=1.5),
            Task("counting", _counting, weight=3.0),
            Task("colors", _colors, weight=0.7),
            Task("position", _position, weight=3.0),
            Task("color_attribution", _color_attribution, held_out=0.1, weight=3.0),
            Task("typography", _typography),
        )
    ),
    layout=Layout(
        size=64,
        margin=2,
        gap=4,
        jitter=3,
        wobble=4,
        near=6.5,
        large=22,
        extent=_extent,
        centres={
            2: ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
            3: ((_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _MIDDLE)),
            4: ((_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _NEAR), (_FAR, _FAR)),
        },
        pairs=compass(_NEAR, _MIDDLE, _FAR),
        centred=frozenset({"typography"}),
    ),
    see=see,
)
