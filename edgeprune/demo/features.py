"""Features of scenes: what a small network, trained on a world's scenes, sees in an image.

The network names what a scene shows: how many things, and which shapes, colours, textures and letters. The layer
before that answer is what edgeprune.metrics.frechet compares. It judges images without knowing their captions.

Notation: B images, S side of an image in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from edgeprune.common.errors import InputError
from edgeprune.metrics.frechet import Features
from edgeprune.shapes import COLOURS, SHAPES, TEXTURES, Meaning, Pixels, World

FOLDER = Path(__file__).parents[2] / "assets" / "features"
WIDTH = 64
"""Features of an image."""
_MOST = 6
"""Things of a scene, at most."""
_WIDTHS = (24, 48, 64, 64)
_TOGETHER = 64


class SceneNetwork(nn.Module):
    """Convolutions of stride 2 down to 4x4 or 8x8, a layer of WIDTH features, and the answer."""

    def __init__(self) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for inner, outer in zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            steps += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.body = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(16 * _WIDTHS[-1], WIDTH), nn.SiLU())
        self.answer = nn.Linear(WIDTH, len(labels_of(Meaning("", ()))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of `labels_of`, (B, labels), for images in -1..1, (B, 3, S, S)."""
        found: torch.Tensor = self.answer(self.features(self.body(images)))
        return found


def labels_of(meaning: Meaning) -> list[float]:
    """Return what a scene shows as zeros and ones: the number of things, shapes, colours, textures, letters."""
    things = meaning.things
    letters = {letter for thing in things if thing.shape not in SHAPES for letter in thing.shape.upper()}
    return [
        *(float(len(things) == count) for count in range(1, _MOST + 1)),
        *(float(any(t.shape == shape for t in things)) for shape in SHAPES),
        *(float(any(colour in (t.colour, t.second) for t in things)) for colour in COLOURS),
        *(float(any(t.texture == texture for t in things)) for texture in TEXTURES),
        *(float(letter in letters) for letter in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ]


def known_of(meaning: Meaning) -> list[float]:
    """Return 1 for each label that the meaning decides, else 0: a colour that it leaves open may be any."""
    colours = all(t.colour and (t.texture is None or t.second) for t in meaning.things)
    counts = (_MOST, len(SHAPES), len(COLOURS), len(TEXTURES), 36)
    return [float(known) for known, count in zip((1, 1, colours, 1, 1), counts, strict=True) for _ in range(count)]


def path_of(world: World) -> Path:
    """Return where the network of a world is."""
    return FOLDER / f"{world.name}.safetensors"


def load(world: World) -> SceneNetwork:
    """Return the network of a world.

    Raises:
        InputError: it is not in this tree.
    """
    path = path_of(world)
    if not path.is_file():
        raise InputError(f"{path}: no such file; train it: python -m edgeprune.demo.train.features {world.name}")
    network = SceneNetwork()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(network: SceneNetwork, images: NDArray[np.uint8] | list[Pixels]) -> Features:
    """Return the features of images (S, S, 3), (B, WIDTH)."""
    pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
    found = [network.features(network.body(part.float() / 127.5 - 1)) for part in pixels.split(_TOGETHER)]
    array: Features = torch.cat(found).double().numpy()
    return array
