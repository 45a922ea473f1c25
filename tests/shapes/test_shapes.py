"""The checker against the renderer, task by task; captions and their splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprune import shapes
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.shapes import TASKS, Meaning, Pixels, Thing

RENDERS = 300
FEWER = 100
"""Renders that pass through the VAE, which takes most of the time; one miss in them is the most that BOUND allows."""
BOUND = 0.99
ASSETS = Path(shapes.__file__).parents[1] / "demo" / "assets" / "teacher"


def meanings(task: str, seed: int, count: int) -> list[Meaning]:
    """Return random meanings of a task, as evenly as possible."""
    known = [p.meaning for p in shapes.prompts(task)]
    order = np.random.default_rng([seed, TASKS.index(task)]).permutation(max(RENDERS, len(known)))
    return [known[i % len(known)] for i in order[:count]]


def renders(task: str, seed: int = 0, count: int = RENDERS) -> list[tuple[Pixels, Meaning]]:
    rng = np.random.default_rng([seed, TASKS.index(task), 1])
    return [(shapes.render(m, rng), m) for m in meanings(task, seed, count)]


def noisy(pixels: list[Pixels]) -> list[Pixels]:
    rng = np.random.default_rng(2)
    return [np.clip(p + rng.normal(0, 8, p.shape), 0, 255).round().astype(np.uint8) for p in pixels]


def others(task: str, found: list[Meaning]) -> list[Meaning]:
    """Return another meaning of the same task for each meaning; every second one has the most similar caption.

    Similar captions have a neighbouring number or colour, or the same things with colours or sides exchanged.
    """
    known = shapes.prompts(task)
    words = sorted({w for p in known for w in p.text.split()})
    bags = np.array([[p.text.split().count(w) for w in words] for p in known])
    keys = np.array([p.meaning.key for p in known])
    at = {p.meaning: i for i, p in enumerate(known)}
    rng = np.random.default_rng(3)
    out = []
    for turn, meaning in enumerate(found):
        other = keys != keys[at[meaning]]
        shared = np.minimum(bags, bags[at[meaning]]).sum(1) * other
        chosen = shared == shared.max() if turn % 2 else other
        out.append(known[int(rng.choice(np.flatnonzero(chosen)))].meaning)
    return out


def rates(change: Callable[[list[Pixels]], list[Pixels]], count: int = RENDERS) -> dict[str, tuple[float, float]]:
    """Return by task the share of renders accepted, and of renders of another meaning rejected."""
    out = {}
    for task in TASKS:
        drawn = renders(task, count=count)
        pixels = change([p for p, _ in drawn])
        true = [m for _, m in drawn]
        accepted = [shapes.check(p, m) for p, m in zip(pixels, true, strict=True)]
        rejected = [not shapes.check(p, m) for p, m in zip(pixels, others(task, true), strict=True)]
        out[task] = float(np.mean(accepted)), float(np.mean(rejected))
    return out


def judge(
    title: str, table: dict[str, tuple[float, float]], capsys: pytest.CaptureFixture[str], count: int = RENDERS
) -> None:
    """Print the table past pytest's capture and check every row against BOUND."""
    rows = [f"{task:18} {a:9.4f} {r:9.4f}" for task, (a, r) in table.items()]
    head = f"{title}, {count} renders per task\n{'task':18} {'accepted':>9} {'rejected':>9}"
    with capsys.disabled():
        print("", head, *rows, sep="\n")
    low = [row for row, pair in zip(rows, table.values(), strict=True) if min(pair) < BOUND]
    assert not low, f"below {BOUND}: {low}"


def test_checker_on_renders(capsys: pytest.CaptureFixture[str]) -> None:
    judge("renders as drawn", rates(lambda pixels: pixels), capsys)


def test_checker_on_noisy_renders(capsys: pytest.CaptureFixture[str]) -> None:
    judge("with noise, sigma 8 of 255", rates(noisy), capsys)


@pytest.mark.skipif(not (ASSETS / "vae").is_dir(), reason="the built-in teacher is not in the tree")
@pytest.mark.parametrize("count", [FEWER, pytest.param(RENDERS, marks=pytest.mark.slow)])
@pytest.mark.slow  # test_checker_on_noisy_renders is quick
def test_checker_after_vae_round_trip(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    vae = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(ASSETS / "vae").float().eval()

    def round_trip(pixels: list[Pixels]) -> list[Pixels]:
        out: list[Pixels] = []
        with torch.no_grad():
            for at in range(0, len(pixels), 50):
                batch = torch.from_numpy(np.stack(pixels[at : at + 50])).permute(0, 3, 1, 2).float() / 127.5 - 1
                back = vae.decode(vae.encode(batch).latent_dist.mode()).sample
                out += list(((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        return out

    judge("after the VAE", rates(round_trip, count), capsys, count)


def test_checker_rejects_nothing_and_too_much() -> None:
    one = Meaning("colors", (Thing("circle", "red"),))
    rng = np.random.default_rng(0)
    empty = np.full((64, 64, 3), shapes.BACKGROUND, np.uint8)
    assert not shapes.check(empty, one)
    assert not shapes.check(rng.integers(0, 256, empty.shape).astype(np.uint8), one)
    two = shapes.render(Meaning("counting", (Thing("circle", "red"),) * 2), rng)
    assert not shapes.check(two, one)


@pytest.mark.parametrize("task", TASKS)
def test_every_split_has_captions_of_every_task(task: str) -> None:
    keys = {split: {p.meaning.key for p in shapes.prompts_of(task, split)} for split in Split}
    total = sum(map(len, keys.values()))
    assert total == len({p.meaning.key for p in shapes.prompts(task)})
    assert all(
        len(keys[Split.TRAINING]) > len(keys[other]) for other in (Split.ANALYSIS, Split.CALIBRATION, Split.TUNING)
    )
    for split in Split:
        assert len([p for p in shapes.evaluation_prompts(4, split=split) if p.meaning.task == task]) == 4


def test_no_meaning_is_in_two_splits() -> None:
    """Over all tasks, since "one red circle" and "a red circle" mean the same."""
    keys = [{p.meaning.key for task in TASKS for p in shapes.prompts_of(task, split)} for split in Split]
    assert sum(map(len, keys)) == len(set().union(*keys)) == len({p.meaning.key for p in shapes.prompts()})
    texts = [{p.text for p in shapes.evaluation_prompts(1000, split=split)} for split in Split]
    assert sum(map(len, texts)) == len(set().union(*texts))
    a, b = shapes.parse("one red circle"), shapes.parse("a drawing of a red circle")
    assert shapes.split(a) is shapes.split(b)


def test_the_built_in_models_own_training_is_unchanged() -> None:
    """Its scenes and its evaluation must stay those of the weights that edgeprune ships."""
    images, captions = shapes.training_scenes(20, 3, shapes.SEEN)
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == (
        "aa559f47102478a639958397401541e2da233165adac2a1ba072fd43ef79e30c"
    )
    assert images.shape == (20, 64, 64, 3)
    held_out = "\n".join(p.text for p in shapes.evaluation_prompts(30))
    assert hashlib.sha256(held_out.encode()).hexdigest() == (
        "560051d369f44a41832ae2d50c8f2e6982dedfe58208ded854482d5790ba4d6d"
    )


def test_distillation_draws_training_meanings_only() -> None:
    _, captions = shapes.training_scenes(300, 3)
    assert {shapes.split(shapes.parse(text)) for text in captions} == {Split.TRAINING}


def test_every_word_of_held_out_captions_is_in_train() -> None:
    words = [
        {w for task in TASKS for p in shapes.prompts_of(task, split) for w in p.text.split()}
        for split in (Split.TRAINING, Split.HELD_OUT)
    ]
    assert words[1] <= words[0]


def test_evaluation_prompts() -> None:
    found = shapes.evaluation_prompts()
    assert len({p.text for p in found}) == len(found) >= 210
    assert all(shapes.split(p.meaning) is Split.HELD_OUT for p in found)
    assert [p.meaning.task for p in found] == [t for t in TASKS for _ in range(len(found) // len(TASKS))]
    assert found == shapes.evaluation_prompts()
    assert found != shapes.evaluation_prompts(seed=1)


def test_two_phrasings_have_one_key() -> None:
    a = shapes.parse("a circle above a star")
    b = shapes.parse("a star below a circle")
    assert a.key == b.key and a != b
    assert a.key != shapes.parse("a circle below a star").key
    assert shapes.parse("a circle and a ring").key == shapes.parse("a ring and a circle").key


@pytest.mark.parametrize("task", TASKS)
def test_parse_reads_every_caption(task: str) -> None:
    for prompt in shapes.prompts(task):
        for template in shapes.TEMPLATES:
            assert shapes.parse(template.format(prompt.text)) == prompt.meaning


def test_parse_forgives_case_and_spaces_only() -> None:
    assert shapes.parse("  Two  RED circles ") == Meaning("counting", (Thing("circle", "red"),) * 2)
    for text in ("", "five red circles", "two red dogs", "two red circles and a star", "a red"):
        with pytest.raises(InputError, match="not a caption"):
            shapes.parse(text)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(InputError, match="single_object"):
        shapes.prompts("hexagons")
    with pytest.raises(InputError, match="circle"):
        shapes.render(Meaning("colors", (Thing("hexagon", "red"),)), np.random.default_rng(0))


def test_score() -> None:
    tasks = ["counting"] * 10 + ["colors"] * 30
    values = np.array([1.0] * 5 + [0.0] * 5 + [1.0] * 30)
    mean, low, high = shapes.score(values, tasks)
    assert mean == pytest.approx(0.75)  # of the tasks, not of the prompts
    assert low < mean < high <= 1
    assert shapes.task_means(values, tasks) == {"counting": 0.5, "colors": 1.0}
    assert shapes.score(np.ones(4), ["colors"] * 4) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("task", ["two_objects", "color_attribution"])
def test_things_without_a_relation_stand_in_the_order_of_the_caption(task: str) -> None:
    rng = np.random.default_rng(5)
    for prompt in shapes.prompts(task)[::37]:
        first, second = prompt.meaning.things
        boxes = {s.shape: s.box for s in shapes.see(shapes.render(prompt.meaning, rng))}
        assert boxes[first.shape][3] + 4 <= boxes[second.shape][1]
