"""Scores a teacher on its world's held-out prompts: python -m edgeprune.demo.evaluate [NAME or FOLDER].

Prints the score of each task, and their mean with a bootstrap 95 % interval over prompts; and the Fréchet distance of
the images to scenes of the same captions, see features.py. To compare two models, use `edgeprune score --against`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import shapes
from edgeprune.api.folders import world_drawn
from edgeprune.artefact.loading import load
from edgeprune.artefact.teachers import TEACHERS, teacher
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.splits import Split
from edgeprune.demo import features
from edgeprune.metrics import frechet, of_images
from edgeprune.metrics.drawn import Drawn
from edgeprune.sampling.generation import Generation


def evaluate(folder: Path, *, per_task: int = 30, seeds: int = 4) -> dict[str, Any]:
    """Return the scores on `per_task` held-out prompts of each task, with `seeds` images per prompt.

    Raises:
        InputError: the folder is no teacher's, and was not made from one; or the world's network of features is not in
            this tree.
    """
    world = world_drawn(folder)
    if world is None:
        raise InputError(f"{folder}: draws no shapes world; expected a teacher, or what was made from one")
    network = features.load(world)
    pipe, generation = load(folder), Generation.load(folder)
    chosen = world.grammar.evaluation_prompts(per_task)
    texts = [p.text for p in chosen]
    metric = Drawn("shapes", of_images("shapes", {}), pipe, generation, texts, split=Split.HELD_OUT, seeds=seeds)
    images = metric.images()
    values = np.asarray(metric.metric.score(list(images), metric.texts, None), float).reshape(-1, seeds).mean(1)
    tasks = [p.meaning.task for p in chosen]
    score, low, high = shapes.score(values, tasks)
    rng = np.random.default_rng(0)
    scenes = [world.render(p.meaning, rng) for p in chosen for _ in range(seeds)]
    apart = frechet.interval(
        features.features(network, images), features.features(network, scenes), list(np.repeat(tasks, seeds))
    )
    return {
        "frechet": apart.mean,
        "frechet_low": apart.low,
        "frechet_high": apart.high,
        "score": score,
        "score_low": low,
        "score_high": high,
        "tasks": world.task_means(values, tasks),
        "prompts": len(chosen),
        "seeds": seeds,
    }


def main() -> None:
    """Read the command line and print the scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.demo.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", default="shapes", help=f"a folder, or one of {', '.join(TEACHERS)}")
    parser.add_argument("--per-task", type=int, default=30, help="held-out prompts of each task")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args = parser.parse_args()
    try:
        folder = Path(args.model) if Path(args.model).is_dir() else teacher(args.model)
        print(json.dumps(evaluate(folder, per_task=args.per_task, seeds=args.seeds), indent=1))
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
