"""Several thousand captions of edgeprune's own: templates over vocabulary.py, the same list on every machine.

They serve models other than the teachers of shapes world, for whatever needs prompts that the user did not give. A
caption has a content, which is what the picture shows, and a phrasing, a style, a light and a framing, which are not.
The content's key decides the split, so a paraphrase in another style never crosses into another split.

Draws use only `Random.random`, whose sequence Python guarantees for a seed. A test fixes the list's SHA-256.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from edgeprune.common.splits import Split, fraction, split_of
from edgeprune.sampling import vocabulary as words

SHARES = {
    Split.TRAINING: 0.7,
    Split.ANALYSIS: 0.07,
    Split.CALIBRATION: 0.07,
    Split.TUNING: 0.06,
    Split.HELD_OUT: 0.1,
}
"""Expected share of the contents in each split."""
_SEED = 17
_T = TypeVar("_T")


@dataclass(frozen=True)
class Caption:
    """A caption, the key of its content, and the split that the content belongs to."""

    text: str
    key: str
    """The same for every phrasing of a content."""
    split: Split


@dataclass(frozen=True)
class _Content:
    """What a caption shows, and ways to say it."""

    parts: tuple[str, ...]
    """The words that make up the content, without articles."""
    phrasings: tuple[str, ...]
    lit: bool = False
    """Whether it names its own light or weather."""
    whole: bool = False
    """Whether the phrasings are whole sentences."""


class _Draw:
    """Random choices that are the same with every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def of(self, items: Sequence[_T]) -> _T:
        """Choose one item."""
        return items[int(self._random.random() * len(items))]

    def several(self, items: Sequence[str], count: int) -> list[str]:
        """Choose different items."""
        left, out = list(items), []
        for _ in range(count):
            out.append(left.pop(int(self._random.random() * len(left))))
        return out

    def maybe(self, chance: float) -> bool:
        """Return True with this probability."""
        return self._random.random() < chance


def _a(phrase: str) -> str:
    """Return a phrase with its indefinite article."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _animal(draw: _Draw) -> _Content:
    animals, doings, places = draw.of(words.ANIMALS)
    name, doing, place = draw.of(animals), draw.of(doings), draw.of(places)
    if draw.maybe(0.4):
        name = f"{draw.of(words.AGES)} {name}"
    return _Content((name, doing, place), (f"{_a(name)} {doing} {place}", f"{_a(name)} {place}, {doing}"))


def _thing(draw: _Draw) -> _Content:
    things, materials, places = draw.of(words.OBJECTS)
    colour, material, thing, place = draw.of(words.COLOURS), draw.of(materials), draw.of(things), draw.of(places)
    if draw.maybe(0.3):  # without a place, the shortest captions
        return _Content((colour, material, thing), (_a(f"{colour} {material} {thing}"),))
    named = _a(f"{material} {thing}")
    return _Content(
        (colour, material, thing, place),
        (f"{_a(f'{colour} {material} {thing}')} {place}", f"{named} in {colour} {place}"),
    )


def _pair(draw: _Draw) -> _Content:
    first, second = (
        f"{draw.of(words.COLOURS if draw.maybe(0.7) else words.MATERIALS)} {thing}"
        for thing in draw.several(words.PAIRED, 2)
    )
    relation, inverse = draw.of(words.RELATIONS)
    phrasings: tuple[str, ...] = (f"{_a(first)} {relation} {_a(second)}", f"{_a(second)} {inverse} {_a(first)}")
    if relation == inverse:
        first, second = sorted((first, second))
        phrasings += (f"{_a(first)} and {_a(second)} side by side",)
    return _Content((first, relation, second), phrasings)


def _count(draw: _Draw) -> _Content:
    things, attributes, places = draw.of(words.COUNTED)
    number, thing, attribute, place = draw.of(words.NUMBERS), draw.of(things), draw.of(attributes), draw.of(places)
    return _Content(
        (number, attribute, thing, place),
        (f"{number} {attribute} {thing} {place}", f"{number} {thing} {place}, all of them {attribute}"),
    )


def _writing(draw: _Draw) -> _Content:
    sign, text = draw.of(words.SIGNS), draw.of(words.TEXTS)
    quoted = f'"{text}"' if draw.maybe(0.7) else f'"{_capital(text.lower())}"'
    colour = f" in {draw.of(words.COLOURS)} letters" if draw.maybe(0.5) else ""
    place = f" {draw.of(words.SIGN_PLACES)}" if draw.maybe(0.4) else ""
    what = "the words" if " " in text else "the word"
    phrasings = (
        f"{_a(sign)}{place} that says {quoted}{colour}",
        f"{_a(sign)}{place} with {what} {quoted}{colour}",
        f"{quoted} written{colour} on {_a(sign)}{place}",
    )
    return _Content((sign, text, colour, place), phrasings)


def _worker(draw: _Draw) -> _Content:
    (role,), doings, places = draw.of(words.WORKERS)
    look, doing, place = draw.of(words.LOOKS), draw.of(doings), draw.of(places)
    named = _a(f"{look} {role}")
    return _Content((look, role, doing, place), (f"{named} {doing} {place}", f"{place}, {named} is {doing}"))


def _leisure(draw: _Draw) -> _Content:
    doings, places = draw.of(words.LEISURE)
    who, doing, place = draw.of(words.GROUPS), draw.of(doings), draw.of(places)
    return _Content((who, doing, place), (f"{who} {doing} {place}", f"{who} {place}, {doing}"))


def _portrait(draw: _Draw) -> _Content:
    person, feature, clothes = draw.of(words.PERSONS), draw.of(words.FEATURES), draw.of(words.CLOTHES)
    backdrop = draw.of(words.BACKDROPS)
    return _Content(
        (person, feature, clothes, backdrop),
        (
            f"a portrait of {_a(person)} with {feature}, wearing {clothes}, {backdrop}",
            f"{_a(person)} in {clothes} {backdrop}; {feature}",
        ),
    )


def _landscape(draw: _Draw) -> _Content:
    place, detail, sky = draw.of(words.LANDSCAPES), draw.of(words.DETAILS), draw.of(words.SKIES)
    return _Content((place, detail, sky), (f"{_a(place)} {detail} {sky}", f"{_a(place)} {sky}, {detail}"), lit=True)


def _street(draw: _Draw) -> _Content:
    place, detail, weather = draw.of(words.STREETS), draw.of(words.STREET_DETAILS), draw.of(words.WEATHER)
    phrasings = (f"{_a(place)} {weather}, {detail}", f"{_a(place)}, {detail}, {weather}")
    return _Content((place, detail, weather), phrasings, lit=True)


def _dish(draw: _Draw) -> _Content:
    dishes, extras, places = draw.of(words.DISHES)
    dish, extra, place = draw.of(dishes), draw.of(extras), draw.of(places)
    return _Content((dish, extra, place), (f"{_a(dish)} {extra} {place}", f"{_a(dish)} {place}, {extra}"))


def _room(draw: _Draw) -> _Content:
    room, (first, second) = draw.of(words.ROOMS), sorted(draw.several(words.FURNISHINGS, 2))
    return _Content(
        (room, first, second),
        (
            f"{_a(room)} with {first} and {second}",
            f"{second} and {first} in {_a(room)}",
            f"the inside of {_a(room)}: {first}, {second}",
        ),
    )


def _plant(draw: _Draw) -> _Content:
    plant, state, place = draw.of(words.PLANTS), draw.of(words.PLANT_STATES), draw.of(words.PLANT_PLACES)
    return _Content((plant, state, place), (f"{_a(plant)} {place}, {state}", f"{_a(plant)} {state}, {place}"))


def _vehicle(draw: _Draw) -> _Content:
    colour, vehicle, place = draw.of(words.COLOURS), draw.of(words.VEHICLES), draw.of(words.VEHICLE_PLACES)
    named = _a(f"{colour} {vehicle}")
    return _Content((colour, vehicle, place), (f"{named} {place}", f"{place}, {named}"))


def _fantasy(draw: _Draw) -> _Content:
    who, deed = draw.of(words.FANTASIES), draw.of(words.DEEDS)
    return _Content((who, deed), (f"{_a(who)} {deed}",))


def _scene(draw: _Draw) -> _Content:
    """Return a long caption of several sentences."""
    (role,), doings, _ = draw.of(words.WORKERS)
    look, doing, room = draw.of(words.LOOKS), draw.of(doings), draw.of(words.ROOMS)
    items, furnishing, surface = draw.several(words.SCENE_ITEMS, 3), draw.of(words.FURNISHINGS), draw.of(words.SURFACES)
    named, listed = _a(f"{look} {role}"), f"{items[0]}, {items[1]} and {items[2]}"
    place, mood = f"{_a(room)} with {furnishing}", draw.of(words.MOODS)
    phrasings = (
        f"{_capital(named)} is {doing} in {place}. On {surface} there are {listed}. {mood}",
        f"{_capital(place)}, where {named} is {doing}. Someone has left {listed} on {surface}. {mood}",
        f"{_capital(listed)} on {surface}. Behind them, in {place}, {named} is {doing}. {mood}",
    )
    return _Content((look, role, doing, room, furnishing, surface, *sorted(items)), phrasings, whole=True)


_KINDS: dict[Callable[[_Draw], _Content], int] = {
    _animal: 480, _thing: 400, _pair: 480, _count: 380, _writing: 460, _worker: 360, _leisure: 240, _portrait: 260,
    _landscape: 320, _street: 240, _dish: 320, _room: 260, _plant: 200, _vehicle: 220, _fantasy: 140, _scene: 340,
}  # fmt: skip
"""How many contents of each kind."""


def _decorated(content: _Content, phrase: str, draw: _Draw) -> str:
    """Return a phrasing, perhaps with a style, a light and a framing."""
    if content.whole:
        return f"{phrase} {_capital(draw.of(words.STYLES))}." if draw.maybe(0.5) else phrase
    notes = [
        draw.of(options)
        for options, chance in ((words.FRAMES, 0.2), (words.LIGHTS, 0 if content.lit else 0.25), (words.STYLES, 0.45))
        if draw.maybe(chance)
    ]
    if draw.maybe(0.2) and phrase.startswith(("a ", "an ", *words.NUMBERS)) and not phrase.startswith("a portrait"):
        phrase = f"{draw.of(words.PREFIXES)} {phrase}"
        notes = [note for note in notes if note not in words.STYLES]
    return ", ".join((phrase, *notes))


@functools.cache
def captions() -> tuple[Caption, ...]:
    """Return all captions, in an order that mixes the kinds; no text occurs twice."""
    draw, contents, texts = _Draw(_SEED), dict[str, _Content](), dict[str, Caption]()
    for make, count in _KINDS.items():
        full = len(contents) + count
        while len(contents) < full:
            content = make(draw)
            contents.setdefault(" / ".join(content.parts), content)
    for key, content in contents.items():
        for phrase in draw.several(content.phrasings, 2 if len(content.phrasings) > 1 and draw.maybe(0.1) else 1):
            text = _decorated(content, phrase, draw)
            texts.setdefault(text, Caption(text, key, split_of(key, SHARES)))
    return tuple(sorted(texts.values(), key=lambda caption: fraction(caption.text)))
