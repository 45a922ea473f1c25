"""Shapes world: captioned 64x64 scenes, and a checker that reads them back from pixels alone.

Seven tasks: the six of GenEval (single object, two objects, counting, colours, position, colour
attribution) and typography. A `Meaning` is what a prompt asks for; `render` draws one scene that
satisfies it, `check` says whether an image does. Meanings are split by a hash into train and
held-out, and two phrasings of one meaning always fall on the same side.

What it leaves out: rotation, overlap, several things in places that the caption does not settle,
textured backgrounds and free text. The caption grammar is closed, so `parse` is a dictionary lookup
and an unknown prompt is an error, not a guess.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from edgeprune.common.errors import InputError
from edgeprune.common.intervals import Interval, mean_interval

SIZE = 64
BACKGROUND = (238, 238, 238)
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

# Share of each task's meanings that training never sees; the small tasks give up more.
_HELD_OUT = {"single_object": 0.25, "two_objects": 0.4, "color_attribution": 0.1}
_HELD_OUT_DEFAULT = 0.2

Pixels = NDArray[np.uint8]
"""One image: (64, 64, 3), RGB."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene; a field that is None is left to chance."""

    shape: str
    """A name from SHAPES, or one character from GLYPHS."""
    colour: str | None = None
    size: str | None = None
    """`small`, `large` or None."""


@dataclass(frozen=True)
class Meaning:
    """What a prompt asks for, as structure."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None
    """Where things[0] is with respect to things[1], from RELATIONS."""
    place: str | None = None
    """Where a single object is, from PLACES."""

    @property
    def key(self) -> str:
        """The same text for every phrasing of the same scene ("A above B" is "B below A")."""
        things, relation = self.things, self.relation
        if relation in ("to the right of", "below"):
            things = things[::-1]
            relation = {"to the right of": "to the left of", "below": "above"}[relation]
        elif relation is None:
            things = tuple(sorted(things, key=repr))
        return repr((things, relation, self.place))

    @property
    def held_out(self) -> bool:
        """True if no training caption has this meaning."""
        share = _HELD_OUT.get(self.task, _HELD_OUT_DEFAULT)
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") / 2**32 < share


@dataclass(frozen=True)
class Prompt:
    """A caption and what it means."""

    text: str
    meaning: Meaning


@functools.cache
def prompts(task: str | None = None) -> tuple[Prompt, ...]:
    """Every meaning with its plain caption (no template), for one task or for all."""
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
    return "an" if word[0] in "aeiou" else "a"


def split(task: str, *, held_out: bool) -> list[Prompt]:
    """The train or the held-out prompts of a task, plain captions."""
    return [p for p in prompts(task) if p.meaning.held_out is held_out]


def evaluation_prompts(per_task: int = 30, *, held_out: bool = True, seed: int = 0) -> list[Prompt]:
    """`per_task` distinct captions per task, task by task; templates fill up where meanings are few."""
    out: list[Prompt] = []
    for task in TASKS:
        plain = split(task, held_out=held_out)
        order = np.random.default_rng([seed, TASKS.index(task)]).permutation(len(plain))
        ordered = [Prompt(t.format(plain[i].text), plain[i].meaning) for t in TEMPLATES for i in order]
        out += ordered[:per_task]
    return out


@functools.cache
def _by_text() -> dict[str, Meaning]:
    return {t.format(p.text).lower(): p.meaning for p in prompts() for t in TEMPLATES}


def parse(text: str) -> Meaning:
    """The meaning of a caption of this grammar.

    Raises:
        InputError: the caption is not in the grammar.
    """
    found = _by_text().get(" ".join(text.lower().split()))
    if found is None:
        raise InputError(
            f"prompt {text!r} is not a caption of shapes world (like 'two red circles'); use another metric"
        )
    return found


# The tasks that are hard to learn get more: which thing is where, and which colour belongs to which.
_TRAINING_WEIGHTS = {
    "single_object": 0.7,
    "two_objects": 1.5,
    "counting": 3.0,
    "colors": 0.7,
    "position": 3.0,
    "color_attribution": 3.0,
    "typography": 1.0,
}


def training_scenes(count: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Scenes (count, 64, 64, 3) and their plain captions. Held-out meanings never appear."""
    rng = np.random.default_rng(seed)
    pools = [split(task, held_out=False) for task in TASKS]
    weights = np.asarray([_TRAINING_WEIGHTS[t] for t in TASKS])
    tasks = rng.choice(len(pools), size=count, p=weights / weights.sum())
    picked = [pools[t][rng.integers(len(pools[t]))] for t in tasks]
    return np.stack([render(p.meaning, rng) for p in picked]), [p.text for p in picked]


# ---------------------------------------------------------------------------------------- drawing

_OVERSAMPLE = 8


def _coverage(image: Image.Image) -> NDArray[np.float32]:
    """A grey image as ink in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


@functools.cache
def _glyph(char: str) -> NDArray[np.float32]:
    """A character as ink in [0, 1], cropped to its box, large."""
    font = ImageFont.load_default(size=256)
    image = Image.new("L", (400, 400), 0)
    ImageDraw.Draw(image).text((80, 40), char, fill=255, font=font, stroke_width=10)
    box = image.getbbox()
    assert box is not None
    return _coverage(image.crop(box))


@functools.cache
def _ink(shape: str, extent: int) -> NDArray[np.float32]:
    """Coverage in [0, 1] of a shape whose longer side is `extent` pixels: (h, w)."""
    if shape in GLYPHS:
        ink = Image.fromarray((_glyph(shape) * 255).astype(np.uint8))
        width = max(1, round(extent * ink.width / ink.height))
        return _coverage(ink.resize((width, extent), Image.Resampling.BOX))
    n = extent * _OVERSAMPLE
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if shape == "ring":
            draw.ellipse((n * 0.25, n * 0.25, n * 0.75, n * 0.75), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, n, n), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n, n), (0, n)], fill=255)
    elif shape == "cross":
        draw.rectangle((n * 0.33, 0, n * 0.67, n), fill=255)
        draw.rectangle((0, n * 0.33, n, n * 0.67), fill=255)
    elif shape == "star":
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21) * n
        # The upper point touches the box; a five-pointed star is a little less tall than wide.
        points = np.stack([n / 2 + radius * np.cos(turn), n / 2 + radius * np.sin(turn)], 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        raise InputError(f"shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    small = image.resize((extent, extent), Image.Resampling.BOX)
    return _coverage(small)


def render(meaning: Meaning, rng: np.random.Generator) -> Pixels:
    """One random scene that satisfies `meaning`: (64, 64, 3)."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUND
    inks = [_ink(t.shape, _extent(meaning, t, rng)) for t in meaning.things]
    corners = _layout(meaning, [ink.shape for ink in inks], rng)
    for thing, ink, (y, x) in zip(meaning.things, inks, corners, strict=True):
        colour = COLOURS[thing.colour or str(rng.choice(list(COLOURS)))]
        h, w = ink.shape
        patch = canvas[y : y + h, x : x + w]
        patch += ink[..., None] * (np.asarray(colour, np.float32) - patch)
    return canvas.round().astype(np.uint8)


def _extent(meaning: Meaning, thing: Thing, rng: np.random.Generator) -> int:
    low, high = {
        "single_object": (14, 17) if thing.size == "small" else (28, 32),
        "counting": (16, 20) if len(meaning.things) > 2 else (16, 24),
        "colors": (20, 34),
        "typography": (34, 40),
    }.get(meaning.task, (18, 25))
    return int(rng.integers(low, high + 1))


def _layout(meaning: Meaning, boxes: list[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top-left corners (y, x) so that boxes keep 2 pixels from the edge and 4 from one another."""
    centres = _centres(meaning) or [None] * len(boxes)
    while True:
        corners = [_corner(meaning, box, centre, rng) for box, centre in zip(boxes, centres, strict=True)]
        rows = [(y, x, y + h, x + w) for (y, x), (h, w) in zip(corners, boxes, strict=True)]
        apart = all(
            a[2] + 4 <= b[0] or b[2] + 4 <= a[0] or a[3] + 4 <= b[1] or b[3] + 4 <= a[1]
            for a, b in itertools.combinations(rows, 2)
        )
        if apart and (meaning.relation is None or _relation(rows[0], rows[1]) == meaning.relation):
            return corners


_NEAR, _MIDDLE, _FAR = 17, 32, 47
_PAIRS = {
    "to the left of": ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
    "to the right of": ((_MIDDLE, _FAR), (_MIDDLE, _NEAR)),
    "above": ((_NEAR, _MIDDLE), (_FAR, _MIDDLE)),
    "below": ((_FAR, _MIDDLE), (_NEAR, _MIDDLE)),
}
"""Centres (y, x) of two things by their relation."""


def _centres(meaning: Meaning) -> tuple[tuple[int, int], ...] | None:
    """Where several things are, before chance moves them a little: without a relation from left to right, as named.

    Where things may be anywhere, a small model draws two of one kind instead of one of each: which of two places is
    whose has to be agreed on from noise alone.
    """
    if len(meaning.things) == 2:
        return _PAIRS[meaning.relation or "to the left of"]
    corners = (_NEAR, _NEAR), (_NEAR, _FAR), (_FAR, _NEAR), (_FAR, _FAR)
    return {3: (*corners[:2], (_FAR, _MIDDLE)), 4: corners}.get(len(meaning.things))


def _corner(
    meaning: Meaning, box: tuple[int, ...], centre: tuple[int, int] | None, rng: np.random.Generator
) -> tuple[int, int]:
    h, w = box
    if centre is not None:
        y, x = (int(c) - side // 2 + int(rng.integers(-3, 4)) for c, side in zip(centre, box, strict=True))
        return min(max(y, 2), SIZE - h - 2), min(max(x, 2), SIZE - w - 2)
    if meaning.place is None and meaning.task != "typography":
        return int(rng.integers(2, SIZE - h - 1)), int(rng.integers(2, SIZE - w - 1))
    jitter = rng.integers(0, 4, size=2)
    place = meaning.place or "middle"
    middle_y, middle_x = (SIZE - h) // 2 + jitter[0] - 2, (SIZE - w) // 2 + jitter[1] - 2
    y = 2 + jitter[0] if "top" in place else SIZE - h - 2 - jitter[0] if "bottom" in place else middle_y
    x = 2 + jitter[1] if "left" in place else SIZE - w - 2 - jitter[1] if "right" in place else middle_x
    return int(y), int(x)


def _relation(a: tuple[int, ...], b: tuple[int, ...], margin: float = 4.0) -> str | None:
    """Where box a is seen from box b; None if neither axis clearly dominates."""
    dy, dx = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) > abs(dy) + margin:
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) > abs(dx) + margin:
        return "above" if dy < 0 else "below"
    return None


# --------------------------------------------------------------------------------------- checking

_GRID = 20
_MASK_LEVEL = 60.0  # distance from the background, of 441, above which a pixel is ink
_MIN_AREA = 30  # pixels; the smallest true shape covers 70
_OUTLINE = 0.4  # coverage at which a shape's edge is
_MAX_SHAPE_ERROR = (
    0.18  # template error (and aspect) above which a thing has no shape; the tables in the tests judge it
)
_MAX_COLOUR_ERROR = 75.0


@dataclass(frozen=True)
class Seen:
    """One object found in an image."""

    shape: str | None
    colour: str | None
    box: tuple[int, int, int, int]
    """y0, x0, y1, x1."""


def see(pixels: Pixels, *, glyphs: bool = False) -> list[Seen]:
    """The objects of an image: connected ink, or all ink as one character if `glyphs`."""
    distance = np.linalg.norm(pixels.astype(np.float32) - np.asarray(BACKGROUND, np.float32), axis=-1)
    mask = distance > _MASK_LEVEL
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    keep = [i for i in range(1, count + 1) if areas[i] >= _MIN_AREA]
    groups = [np.isin(labels, keep)] if glyphs and keep else [labels == i for i in keep]
    return [_look(pixels, distance, group, GLYPHS if glyphs else SHAPES) for group in groups]


def _look(
    pixels: Pixels, distance: NDArray[np.float32], group: NDArray[np.bool_], names: str | tuple[str, ...]
) -> Seen:
    level = float(np.quantile(distance[group], 0.8))
    # The box follows the half-covered outline, so that a soft edge does not widen it.
    ys, xs = np.nonzero(group & (distance > _OUTLINE * level))
    box = int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1
    core = pixels[group & (distance > 0.9 * level)].astype(np.float32)
    centre = np.median(core, axis=0)
    errors = {name: float(np.linalg.norm(centre - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    colour = min(errors, key=errors.__getitem__)
    window = np.s_[box[0] : box[2], box[1] : box[3]]
    soft = np.clip(distance[window] / level, 0, 1) * group[window]
    shape = _classify(soft.astype(np.float32), names)
    return Seen(shape, colour if errors[colour] <= _MAX_COLOUR_ERROR else None, box)


def _normalise(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Ink resized to (20, 20) within its own box, and the box's aspect in front: (401,)."""
    grid = Image.fromarray(ink).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    return np.asarray(grid, dtype=np.float32)


@functools.cache
def _templates(names: str | tuple[str, ...]) -> list[tuple[str, float, NDArray[np.float32]]]:
    extents = (34, 37, 40) if names == GLYPHS else (14, 17, 20, 24, 30)
    out = []
    for name, extent in itertools.product(names, extents):
        ink = _ink(name, extent)
        mask = ink > _OUTLINE
        ys, xs = np.nonzero(mask)
        ink = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        out.append((name, ink.shape[1] / ink.shape[0], _normalise(np.ascontiguousarray(ink))))
    return out


def _classify(ink: NDArray[np.float32], names: str | tuple[str, ...]) -> str | None:
    """The best template's name, or None if even that one does not fit."""
    grid, aspect = _normalise(np.ascontiguousarray(ink)), ink.shape[1] / ink.shape[0]
    errors = [
        (float(np.abs(grid - template).mean()) + 0.25 * abs(np.log(aspect / expected)), name)
        for name, expected, template in _templates(names)
    ]
    error, name = min(errors)
    return name if error <= _MAX_SHAPE_ERROR else None


def check(pixels: Pixels, meaning: Meaning) -> bool:
    """Whether an image, (64, 64, 3) uint8, shows exactly what `meaning` asks for and nothing else."""
    seen = see(pixels, glyphs=meaning.task == "typography")
    if len(seen) != len(meaning.things):
        return False
    if any(
        all(_fits(s, t) for s, t in zip(order, meaning.things, strict=True)) for order in itertools.permutations(seen)
    ):
        return _placed(seen, meaning)
    return False


def _fits(seen: Seen, thing: Thing) -> bool:
    extent = max(seen.box[2] - seen.box[0], seen.box[3] - seen.box[1])
    return (
        seen.shape == thing.shape
        and (seen.colour == thing.colour if thing.colour else seen.colour is not None)
        and (thing.size is None or (thing.size == "large") == (extent >= 22))
    )


def _placed(seen: list[Seen], meaning: Meaning) -> bool:
    if meaning.relation:
        first, second = (next(s for s in seen if s.shape == t.shape) for t in meaning.things)
        return _relation(first.box, second.box, margin=0.0) == meaning.relation
    if meaning.place:
        y0, x0, y1, x1 = seen[0].box
        dy, dx = (y0 + y1 - SIZE) / 2, (x0 + x1 - SIZE) / 2
        near = 6.5
        row = "" if abs(dy) < near else "top" if dy < 0 else "bottom"
        column = "" if abs(dx) < near else "left" if dx < 0 else "right"
        return (f"{row} {column}".strip() or "middle") == meaning.place
    return True


# ---------------------------------------------------------------------------------------- scoring


def task_means(values: NDArray[np.float64], tasks: list[str]) -> dict[str, float]:
    """Mean of the per-prompt values by task, in the order of TASKS."""
    names = np.asarray(tasks)
    return {t: float(values[names == t].mean()) for t in TASKS if t in Counter(tasks)}


def score(values: NDArray[np.float64], tasks: list[str]) -> Interval:
    """Mean over tasks with a bootstrap 95 % interval over prompts within each task.

    Args:
        values: share of satisfied images per prompt, (P,).
        tasks: task of each prompt.
    """
    return mean_interval(values, tasks)
