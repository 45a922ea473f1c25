"""The user study: who sees what, in which order."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from edgeprune.user_study import design
from edgeprune.user_study.design import Study, trials, williams


def study_of(mode: str, variants: int, prompts: int, per_rater: int, checks: int = 0) -> Study:
    names = tuple(f"v{i}" for i in range(variants))
    texts = tuple(map(str, range(prompts)))
    return Study(
        id="0" * 16,
        title="t",
        mode=mode,
        seed=0,
        variants=names,
        prompts=texts,
        files=texts,
        per_rater=per_rater,
        checks=checks,
    )


@pytest.mark.parametrize("count", range(1, 8))
def test_in_a_williams_square_all_places_and_all_neighbours_are_equally_frequent(count: int) -> None:
    rows = williams(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    places = Counter((place, value) for row in rows for place, value in enumerate(row))
    follows = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(set(places.values())) == 1
    assert len(follows) == count * (count - 1) and len(set(follows.values())) <= 1


@pytest.mark.parametrize(
    ("mode", "variants", "prompts", "per_rater"),
    [
        ("mos", 3, 4, 12),
        ("mos", 3, 7, 5),
        ("mos", 2, 6, 6),
        ("pairs", 2, 6, 4),
        ("pairs", 3, 4, 12),
        ("pairs", 3, 5, 4),
    ],
)
def test_every_cell_is_shown_equally_often(mode: str, variants: int, prompts: int, per_rater: int) -> None:
    study = study_of(mode, variants, prompts, per_rater)
    cells = prompts * len(design.conditions(mode, variants))
    seen: Counter[Any] = Counter()
    sides: Counter[Any] = Counter()
    for rater in range(4 * cells):
        mine = trials(study, rater)
        assert len(mine) == per_rater
        assert len({(t.prompt, frozenset(t.shown)) for t in mine}) == per_rater  # nothing twice
        seen.update((t.prompt, frozenset(t.shown)) for t in mine)
        sides.update((t.prompt, t.shown) for t in mine)
        own = Counter(frozenset(t.shown) for t in mine)
        assert max(own.values()) - min(own[frozenset(c)] for c in design.conditions(mode, variants)) <= 2
        assert max(seen.values()) - (min(seen.values()) if len(seen) == cells else 0) <= 1
    assert len(seen) == cells and len(set(seen.values())) == 1
    assert len(sides) == cells * (2 if mode == "pairs" else 1)
    assert len(set(sides.values())) == 1  # left as often as right, for every prompt and pair


def test_order_is_balanced_random_and_repeatable() -> None:
    study = study_of("mos", 4, 8, 32)
    places: Counter[Any] = Counter()
    first = Counter(
        (place, t.shown[0]) for r in range(4) for place, t in enumerate(trials(study_of("mos", 4, 8, 4), r))
    )
    assert len(first) == 16  # in the first four trials as well
    again = 0
    for rater in range(10 * len(williams(4))):
        mine = trials(study, rater)
        places.update((place % 4, t.shown[0]) for place, t in enumerate(mine))
        again += sum(a.prompt == b.prompt for a, b in itertools.pairwise(mine))
        assert mine == trials(study, rater)
    assert len(set(places.values())) == 1
    assert again <= 0.01 * 40 * 31  # only at a rater's end, where nothing else may be left; by chance it would be 10 %
    assert [t.prompt for t in trials(study, 0)] != [t.prompt for t in trials(study, 4)]


@pytest.mark.parametrize("mode", design.MODES)
def test_checks_come_in_every_part_but_never_first(mode: str) -> None:
    asked = set()
    for rater in range(40):
        mine = trials(study_of(mode, 3, 8, 24, checks=3), rater)
        places = [i for i, t in enumerate(mine) if t.asked is not None]
        assert len(mine) == 27 and len(places) == 3 and 0 < places[0] < 10 < places[2]
        asked |= {t.asked for t in mine}
    assert asked == {None, *design.SCALE[mode]} - {0}
