"""Aspect-ratio buckets, and batches and training with images of several sizes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from caching import MIXED, cached, images, opened
from distilling import recipe, schedule
from safetensors.torch import load_file
from tiny import KINDS, TOKENS, config_of, tiny_inputs

from edgeprune.artefact.surgery import prune
from edgeprune.data.buckets import RATIO, bucket_sizes, enlarged, nearest
from edgeprune.data.pairs import Pairs, Samples
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.training.recipe import DistillOptions
from edgeprune.training.whole import distill


@pytest.mark.parametrize(
    ("base", "unit", "largest"),
    [((64, 64), 8, 128), ((1024, 1024), 16, None), ((768, 1344), 16, 1536), ((40, 40), 8, 40)],
)
def test_bucket_sizes(base: tuple[int, int], unit: int, largest: int | None) -> None:
    sizes = bucket_sizes(base, unit, largest)
    assert base in sizes and sizes == sorted(set(sizes))
    for height, width in sizes:
        assert height % unit == width % unit == 0 and height * width <= math.prod(base)
        assert (height, width) == base or max(height, width) <= RATIO * min(height, width)
        assert largest is None or max(height, width) <= largest
    if base[0] == base[1]:
        assert {(w, h) for h, w in sizes} == set(sizes)
    assert min(map(math.prod, sizes)) > 0.7 * math.prod(base)
    assert len(sizes) > 3 or largest == 40


def test_an_image_goes_to_the_nearest_ratio() -> None:
    sizes = bucket_sizes((64, 64), 8)
    assert sizes == [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]
    assert [nearest(s, sizes) for s in ((100, 100), (300, 100), (60, 80), (5, 9))] == [
        (64, 64), (80, 48), (56, 72), (48, 80),
    ]  # fmt: skip
    assert enlarged((32, 40), (64, 64)) == 2.0


def test_buckets_are_counted_and_small_images_skipped(pipe: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cached(pipe, model, images(tmp_path / "images", MIXED), out, buckets=True)
    assert made.index.sizes == {"48x80": 3, "64x64": 5, "72x56": 1, "80x48": 1}
    (skipped,) = json.loads((out / "skipped.json").read_text())["skipped"]
    assert skipped[0] == "7.png" and "found 20 x 20, which would grow 3.2 times to 64 x 64" in skipped[1]
    tensors = load_file(out / "shard-00000.safetensors")
    assert tensors["latents.48x80"].shape == (1, 8, 6, 10) and tensors["latents.64x64"].shape == (2, 8, 8, 8)
    pairs = opened(out, model)
    assert len(pairs) == 10
    drawn = Counter(tuple(pairs.batch(2, 0.1, torch.Generator().manual_seed(i)).latents.shape) for i in range(1000))
    assert {k[2:]: round(v / 100) for k, v in drawn.items()} == {(6, 10): 3, (8, 8): 5, (9, 7): 1, (10, 6): 1}


def samples(*sizes: tuple[int, int], count: int = 6) -> list[Samples]:
    g = torch.Generator().manual_seed(3)
    width = tiny_inputs()["pooled_projections"].shape[-1]
    return [
        Samples(
            torch.randn(count, 8, *size, generator=g), torch.arange(count) % 3,
            torch.randn(3, TOKENS, width, generator=g), torch.randn(3, width, generator=g),
        )
        for size in sizes
    ]  # fmt: skip


def test_batches_of_one_size_are_drawn_as_they_always_were() -> None:
    """Whether in three shards or in one; published results depend on the order of random draws."""
    cut = samples((8, 8), (8, 8), (8, 8))
    pairs, generator = Pairs(cut), torch.Generator().manual_seed(5)
    batch = pairs.batch(32, 0.3, generator)
    again = torch.Generator().manual_seed(5)
    picked = torch.randint(18, (32,), generator=again)
    dropped = torch.rand(32, generator=again) < 0.3
    assert torch.equal(generator.get_state(), again.get_state())
    assert torch.equal(batch.latents, torch.cat([p.latents for p in cut])[picked])
    hidden = torch.cat([p.hidden[p.rows] for p in cut])[picked]
    empty = torch.cat([p.hidden[p.rows * 0] for p in cut])[picked]
    assert torch.equal(batch.hidden, torch.where(dropped[:, None, None], empty, hidden))


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "z-image", "qwen-image"])
def test_training_takes_latents_of_several_sizes(kind: str, tmp_path: Path) -> None:
    teacher = KINDS[kind]()
    config = config_of(teacher)
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", blocks="2")

    def run(path: Path, sizes: tuple[tuple[int, int], ...], steps: int) -> list[float]:
        student = prune(family, teacher, config, plan, None)
        options = DistillOptions(steps=steps, batch=2, rate=1e-3, sensitivity="off", int4_group_size=None)
        return distill(
            family, teacher, student, plan, None, Pairs(samples(*sizes)), options, recipe(options), schedule(teacher),
            path, inputs_digest="x", save_every=3,
        )[1]  # fmt: skip

    sizes = ((8, 8), (6, 10), (10, 6))
    losses = run(tmp_path / "s", sizes, 6)
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    # Wide and high images have different positions: the same numbers in another shape are another image.
    wide, high = (run(tmp_path / f"{size}", (size,), 1) for size in sizes[1:])
    assert wide != high
