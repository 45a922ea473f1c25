"""Trains the network of a world's features: python -m edgeprune.demo.train.features plain (or rich).

It learns from rendered scenes of the training split, five minutes on a core, and is not resumable.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from edgeprune.common.splits import Split
from edgeprune.demo.features import SceneNetwork, known_of, labels_of, path_of
from edgeprune.demo.train.loop import ProgressLine, descend, falling
from edgeprune.demo.train.scenes import scenes, to_unit
from edgeprune.shapes import WORLDS, World
from edgeprune.training.resume import step_generator

_BATCH, _RATE = 64, 2e-3


def train(world: World, *, steps: int, count: int, seed: int = 0) -> SceneNetwork:
    """Return a network that was trained on `count` scenes: binary cross-entropy of the labels that captions decide."""
    torch.manual_seed(seed)
    network = SceneNetwork().train()
    images, captions = scenes(world, (Split.TRAINING,), count, (seed, 1))
    meanings = [world.grammar.parse(caption) for caption in captions]
    labels = torch.tensor([labels_of(meaning) for meaning in meanings])
    known = torch.tensor([known_of(meaning) for meaning in meanings])
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.01)
    progress = ProgressLine("features", 0, steps)
    for step in range(steps):
        picked = torch.randint(len(images), (_BATCH,), generator=step_generator(seed, step))
        answer = network(to_unit(images[picked]))
        loss = F.binary_cross_entropy_with_logits(answer, labels[picked], weight=known[picked])
        descend(loss, network, optimizer, rate=falling(step, steps, _RATE))
        progress(step + 1, loss.item())
    return network.eval()


@torch.no_grad()
def right(network: SceneNetwork, world: World, count: int = 500, seed: int = 1) -> float:
    """Return the share of held-out scenes of which each label that the caption decides is right."""
    images, captions = scenes(world, (Split.HELD_OUT,), count, (seed, 2))
    meanings = [world.grammar.parse(caption) for caption in captions]
    labels = torch.tensor([labels_of(meaning) for meaning in meanings]) > 0.5
    known = torch.tensor([known_of(meaning) for meaning in meanings]) > 0.5
    found = torch.cat([network(to_unit(part)) > 0 for part in images.split(_BATCH)])
    return float(((found == labels) | ~known).all(1).float().mean())


def main() -> None:
    """Read the command line, train and save."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.demo.train.features", description=__doc__)
    worlds = {world.name: world for world in WORLDS.values()}
    parser.add_argument("world", choices=worlds)
    parser.add_argument("--out", type=Path, help="the file; default: where edgeprune.demo.evaluate looks for it")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=24_000)
    args = parser.parse_args()
    world = worlds[args.world]
    network, path = train(world, steps=args.steps, count=args.scenes), args.out or path_of(world)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    print(f"wrote {path}; of 500 held-out scenes, all labels of {right(network, world):.1%} are right")


if __name__ == "__main__":
    main()
