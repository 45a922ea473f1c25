"""Tuning the teacher on corrections of its own drawings: what is drawn, and what a correction is."""

import numpy as np
import pytest

from edgeprune.demo import shapes
from edgeprune.demo.tune import corrected, pick_prompts


def test_held_out_meanings_are_never_drawn() -> None:
    drawn = pick_prompts(1000, np.random.default_rng(0))
    assert len(drawn) == 1000 and {p.meaning.task for p in drawn} == set(shapes.TASKS)
    assert not any(p.meaning.held_out for p in drawn)
    assert all(shapes.parse(p.text) == p.meaning for p in drawn)


@pytest.mark.parametrize("task", shapes.TASKS)
def test_a_correction_satisfies_the_prompt(task: str) -> None:
    rng = np.random.default_rng(1)
    pool = shapes.prompts(task)
    asked = [pool[i] for i in rng.integers(len(pool), size=20)]
    drawn = np.stack([shapes.render(pool[i].meaning, rng) for i in rng.integers(len(pool), size=20)])
    drawn[0] = shapes.BACKGROUND  # nothing drawn
    scenes, right = corrected(drawn, asked, rng)
    assert scenes.shape == drawn.shape and right.mean() < 1
    assert all(shapes.check(scene, prompt.meaning) for scene, prompt in zip(scenes, asked, strict=True))


def seen(pixels: shapes.Pixels) -> dict[str | None, shapes.Seen]:
    return {s.shape: s for s in shapes.see(pixels)}


def test_a_correction_changes_no_more_than_it_must() -> None:
    rng = np.random.default_rng(2)
    drawn = shapes.render(shapes.parse("a circle to the left of a star"), rng)
    first, second = (seen(drawn)[shape] for shape in ("circle", "star"))
    same = shapes.nearest_render(drawn, shapes.parse("a circle and a star"), rng)
    assert np.abs(same.astype(int) - drawn).mean() < 1
    other = seen(shapes.nearest_render(drawn, shapes.parse("a cross and a square"), rng))
    assert (other["cross"].colour, other["square"].colour) == (first.colour, second.colour)
    for old, new in ((first, other["cross"]), (second, other["square"])):
        assert np.abs(np.subtract(old.box, new.box)).max() <= 4


def test_a_correction_turns_the_scene_where_the_relation_asks_for_it() -> None:
    rng = np.random.default_rng(3)
    drawn = shapes.render(shapes.parse("a circle to the left of a star"), rng)
    before, after = seen(drawn), seen(shapes.nearest_render(drawn, shapes.parse("a star above a circle"), rng))
    assert [after[s].colour for s in ("circle", "star")] == [before[s].colour for s in ("star", "circle")]
    assert after["star"].box[2] <= after["circle"].box[0]
