"""The network of a world's features: what it learns, and what its distance says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.demo import features
from edgeprune.demo.train.features import right
from edgeprune.metrics import frechet
from edgeprune.shapes import PLAIN, RICH, World
from edgeprune.shapes.meaning import Meaning, Thing

WORLDS = [PLAIN, RICH]


def test_labels_are_what_a_scene_shows() -> None:
    scene = Meaning("colors", (Thing("circle", "red", texture="dotted", second="blue"), Thing("star", "red")))
    labels, known = features.labels_of(scene), features.known_of(scene)
    assert len(labels) == len(known) and sum(labels) == 1 + 2 + 2 + 1 and sum(known) == len(known)
    open_colour = Meaning("two_objects", (Thing("circle"), Thing("star")))
    assert len(known) - sum(features.known_of(open_colour)) == 8
    word = features.labels_of(Meaning("typography", (Thing("SKY", "red"), Thing("SUN", "blue"))))
    assert sum(word[-36:]) == len(set("SKYSUN"))


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_it_reads_held_out_scenes_and_tells_damage_from_variety(world: World) -> None:
    network = features.load(world)
    assert right(network, world, count=100) > {"plain": 0.75, "rich": 0.55}[world.name]
    sets = [world.training_scenes(400, (seed, 9), (Split.HELD_OUT,))[0] for seed in (1, 2)]
    one, other = (features.features(network, images) for images in sets)
    assert one.shape == (400, features.WIDTH)
    blurred = sets[1].astype(np.float32)
    for axis in (1, 2):
        blurred = sum(np.roll(blurred, shift, axis) for shift in range(-4, 5)) / 9
    damaged = features.features(network, blurred.astype(np.uint8))
    assert frechet.distance(damaged, one) > 3 * frechet.distance(other, one)
    black = features.features(network, np.zeros_like(sets[1]))
    assert frechet.distance(black, one) > frechet.distance(damaged, one)


def test_a_network_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"plain\.safetensors: no such file; train it: python -m edgeprune\.demo"):
        features.load(PLAIN)
    assert (
        features.SceneNetwork()(torch.zeros(1, 3, 64, 64)).shape
        == features.SceneNetwork()(torch.zeros(1, 3, 128, 128)).shape
    )
