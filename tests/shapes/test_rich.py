"""The rich world: its checker against its renderer, and its splits."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.common.splits import Split
from edgeprune.shapes import PLAIN, RICH, WORLDS, Meaning, Thing
from edgeprune.shapes.__main__ import sheet

TASKS = RICH.grammar.names
BOUND = 0.99
COUNTS = [pytest.param(6, id="few"), pytest.param(200, marks=pytest.mark.slow, id="many")]


def meanings(task: str, count: int, seed: int = 0) -> list[Meaning]:
    """Return random meanings of a task."""
    known = RICH.grammar.prompts(task)
    rng = np.random.default_rng([seed, TASKS.index(task)])
    return [known[i].meaning for i in rng.integers(len(known), size=count)]


def another(meaning: Meaning, rng: np.random.Generator) -> Meaning:
    """Return another meaning of the task, of ten random ones that whose caption shares most words."""
    known = RICH.grammar.prompts(meaning.task)
    words = set(next(p.text for p in known if p.meaning == meaning).split())
    drawn = [known[i] for i in rng.integers(len(known), size=10)]
    return max(
        (p for p in drawn if p.meaning.key != meaning.key), key=lambda p: len(words & set(p.text.split()))
    ).meaning


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", TASKS)
def test_checker_accepts_what_is_drawn_and_nothing_else(task: str, count: int) -> None:
    rng = np.random.default_rng(1)
    accepted, passed = [], []
    for meaning in meanings(task, count):
        pixels = RICH.render(meaning, rng)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).round().astype(np.uint8)
        accepted += [RICH.check(pixels, meaning), RICH.check(noisy, meaning)]
        passed.append(RICH.check(pixels, another(meaning, rng)))
    assert np.mean(accepted) >= BOUND and np.mean(passed) <= 1 - BOUND


@pytest.mark.parametrize("change", [{"texture": "striped"}, {"second": "cyan"}, {"colour": "blue"}, {"shape": "ring"}])
def test_checker_sees_each_part_of_a_thing(change: dict[str, str]) -> None:
    shown = {"shape": "circle", "colour": "red", "texture": "dotted", "second": "green"}
    pixels = RICH.render(Meaning("colors", (Thing(**shown),)), np.random.default_rng(0))
    assert RICH.check(pixels, Meaning("colors", (Thing(**shown),)))
    assert not RICH.check(pixels, Meaning("colors", (Thing(**shown | change),)))


def test_words_change_neither_place_nor_colour_unnoticed() -> None:
    sun, sky = Thing("SUN", "red"), Thing("SKY", "blue")
    pixels = RICH.render(Meaning("typography", (sun, sky), "above"), np.random.default_rng(0))
    assert RICH.check(pixels, Meaning("typography", (sun, sky), "above"))
    assert not RICH.check(pixels, Meaning("typography", (sky, sun), "above"))
    assert not RICH.check(pixels, Meaning("typography", (Thing("SUN", "blue"), Thing("SKY", "red")), "above"))


def test_every_split_has_captions_of_every_task_and_no_meaning_is_in_two() -> None:
    keys = [{p.meaning.key for task in TASKS for p in RICH.grammar.prompts_of(task, split)} for split in Split]
    assert sum(map(len, keys)) == len(set().union(*keys)) == len({p.meaning.key for p in RICH.grammar.prompts()})
    for split in Split:
        found = [p.meaning.task for p in RICH.grammar.evaluation_prompts(20, split=split)]
        assert found == [task for task in TASKS for _ in range(20)]


def test_every_word_of_held_out_captions_is_in_train() -> None:
    words = [
        {w for task in TASKS for p in RICH.grammar.prompts_of(task, split) for w in p.text.split()}
        for split in (Split.TRAINING, Split.HELD_OUT)
    ]
    assert words[1] <= words[0]


def test_every_caption_is_another_one_and_read_back() -> None:
    found = RICH.grammar.prompts()
    assert len({p.text for p in found}) == len(found)
    assert all(RICH.grammar.parse(p.text) == p.meaning for p in found)


def test_worlds_are_told_apart_by_size() -> None:
    assert {64: PLAIN, 128: RICH} == WORLDS
    assert RICH.render(meanings("counting", 1)[0], np.random.default_rng(0)).shape == (128, 128, 3)


def test_a_sheet_shows_a_scene_of_each_task() -> None:
    page = np.asarray(sheet(RICH))
    shown = [
        page[y + 12 : y + 140, x + 12 : x + 140] for y in range(0, len(page), len(page) // 3) for x in (0, 188, 376)
    ]
    first = RICH.grammar.evaluation_prompts(1, split=Split.TRAINING)
    assert [RICH.check(pixels, prompt.meaning) for pixels, prompt in zip(shown, first, strict=True)] == [True] * 9
