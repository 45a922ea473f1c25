"""Where things are in a scene: near fixed centres where there are several, so that a caption says which is where."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.shapes.meaning import Meaning, Thing

Box = tuple[int, int, int, int]
"""y0, x0, y1, x1."""
Centres = tuple[tuple[int, int], ...]
"""(y, x) of each thing."""


@dataclass(frozen=True)
class Layout:
    """The measures of a world's scenes, in pixels."""

    size: int
    """Side of a scene."""
    margin: int
    """Least distance of a thing from the edge."""
    gap: int
    """Least distance between two things."""
    jitter: int
    """Most that a thing is moved from its centre, in y and in x."""
    wobble: int
    """Number of positions, in y and in x, of a thing that has a place."""
    near: float
    """A thing whose centre is nearer to the middle, in y or in x, counts as being in the middle."""
    large: int
    """Least extent of a large thing."""
    extent: Callable[[Meaning, Thing], tuple[int, int]]
    """Least and greatest longer side of a thing; of a word, its height."""
    centres: Mapping[int, Centres]
    """Centres of several things by their number; as named, from left to right and from top to bottom."""
    pairs: Mapping[str, Centres]
    """Centres of two things by their relation."""
    centred: frozenset[str] = frozenset()
    """Tasks whose single thing is in the middle although its caption says no place."""

    def corners(
        self, meaning: Meaning, boxes: Sequence[tuple[int, int]], rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Draw top-left corners (y, x) of boxes (h, w) that satisfy `meaning` and are far enough apart."""
        centres = self._centres(meaning)
        while True:
            corners = [self._corner(meaning, box, centre, rng) for box, centre in zip(boxes, centres, strict=True)]
            rows = [(y, x, y + h, x + w) for (y, x), (h, w) in zip(corners, boxes, strict=True)]
            gap = self.gap
            apart = all(
                a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]
                for a, b in itertools.combinations(rows, 2)
            )
            if apart and (meaning.relation is None or relation_of(rows[0], rows[1], gap) == meaning.relation):
                return corners

    def _centres(self, meaning: Meaning) -> Sequence[tuple[int, int] | None]:
        """Return the centres of several things before random jitter; without a relation, in the order of the caption.

        If two things could be anywhere, a small model would draw two of one kind instead of one of each: noise alone
        would decide which thing is where.
        """
        if meaning.relation:
            return self.pairs[meaning.relation]
        return self.centres.get(len(meaning.things), [None] * len(meaning.things))

    def _corner(
        self, meaning: Meaning, box: tuple[int, int], centre: tuple[int, int] | None, rng: np.random.Generator
    ) -> tuple[int, int]:
        """Draw one box's top-left corner (y, x): near its centre, anywhere, or at the meaning's place."""
        (h, w), size, margin = box, self.size, self.margin
        if centre is not None:
            y, x = (
                int(c) - side // 2 + int(rng.integers(-self.jitter, self.jitter + 1))
                for c, side in zip(centre, box, strict=True)
            )
            return min(max(y, margin), size - h - margin), min(max(x, margin), size - w - margin)
        if meaning.place is None and meaning.task not in self.centred:
            return int(rng.integers(margin, size - h - margin + 1)), int(rng.integers(margin, size - w - margin + 1))
        moved = rng.integers(0, self.wobble, size=2)
        place, half = meaning.place or "middle", self.wobble // 2
        middle_y, middle_x = (size - h) // 2 + moved[0] - half, (size - w) // 2 + moved[1] - half
        y = margin + moved[0] if "top" in place else size - h - margin - moved[0] if "bottom" in place else middle_y
        x = margin + moved[1] if "left" in place else size - w - margin - moved[1] if "right" in place else middle_x
        return int(y), int(x)

    def place_of(self, box: Box) -> str:
        """Return the place of a thing, from PLACES; `top`, `left` and so on between two of them."""
        y0, x0, y1, x1 = box
        dy, dx = (y0 + y1 - self.size) / 2, (x0 + x1 - self.size) / 2
        row = "" if abs(dy) < self.near else "top" if dy < 0 else "bottom"
        column = "" if abs(dx) < self.near else "left" if dx < 0 else "right"
        return f"{row} {column}".strip() or "middle"


def compass(near: int, middle: int, far: int) -> dict[str, Centres]:
    """Return the centres of two things by their relation."""
    return {
        "to the left of": ((middle, near), (middle, far)),
        "to the right of": ((middle, far), (middle, near)),
        "above": ((near, middle), (far, middle)),
        "below": ((far, middle), (near, middle)),
    }


def relation_of(a: Box, b: Box, margin: float) -> str | None:
    """Return where box a is relative to box b; None if neither axis clearly dominates."""
    dy, dx = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) > abs(dy) + margin:
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) > abs(dx) + margin:
        return "above" if dy < 0 else "below"
    return None
