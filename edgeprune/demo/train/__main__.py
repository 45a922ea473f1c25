"""Trains a teacher of shapes world from scratch: python -m edgeprune.demo.train NAME.

An interrupted training resumes; repeat the command. Two trainings can run at once; teachers of one world share its VAE
and its scenes, for which the second waits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from edgeprune.common.errors import EdgepruneError, LockedError
from edgeprune.common.lock import LOCK, Lock, hold
from edgeprune.demo.train.forecast import forecast
from edgeprune.demo.train.matching import load_average, train_transformer
from edgeprune.demo.train.recipes import RECIPES, Recipe
from edgeprune.demo.train.saving import save_pipeline
from edgeprune.demo.train.scenes import make_latents
from edgeprune.demo.train.vae import train_vae


def train(name: str, recipe: Recipe, work: Path, out: Path, *, seed: int = 0, compiled: bool = False) -> None:
    """Train what is missing of a teacher, and write its pipeline.

    Args:
        name: of the teacher.
        recipe: how it is trained.
        work: folder of the stages and their checkpoints; teachers of a world share its folder there.
        out: the pipeline's folder, which is replaced.
        seed: of everything random.
        compiled: compile the transformer.

    Raises:
        LockedError: another process trains the same there.
    """
    world, vae_recipe, shared, own = recipe.world, recipe.vae, work / recipe.world.name, work / name
    with wait(shared):
        vae = train_vae(
            shared, world, recipe.splits,
            steps=vae_recipe.steps, seed=seed, count=vae_recipe.scenes, rate=vae_recipe.rate, start=vae_recipe.start,
        )  # fmt: skip
        latents, captions = make_latents(shared, vae, world, recipe.splits, count=recipe.scenes, seed=seed + 2)
    with hold(own / LOCK, own):
        torch.manual_seed(seed + 3)
        networks = recipe.networks(own, world.grammar)
        train_transformer(
            own, networks, latents, captions,
            steps=recipe.steps, seed=seed, batch=recipe.batch, peak=recipe.rate, compiled=compiled,
        )  # fmt: skip
        save_pipeline(networks.pipeline(vae), out, recipe.generation, recipe.world)


def wait(folder: Path) -> Lock:
    """Take a folder's lock; while another training has it, wait."""
    said = False
    while True:
        try:
            return hold(folder / LOCK, folder)
        except LockedError:
            if not said:
                print(f"waiting for another training, which makes {folder}", flush=True)
            said = True
            time.sleep(5)


def draft(name: str, recipe: Recipe, work: Path, out: Path) -> None:
    """Write the pipeline of an unfinished training's last checkpoint. The training may be running.

    Raises:
        InputError: there is no checkpoint.
    """
    networks = recipe.networks(work / name, recipe.world.grammar)
    load_average(work / name, networks)
    vae = AutoencoderKL.from_pretrained(work / recipe.world.name / "vae")
    save_pipeline(networks.pipeline(vae), out, recipe.generation, recipe.world)


def main() -> None:
    """Read the command line, print the forecast, and train what is missing."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.demo.train", description=__doc__)
    parser.add_argument("name", choices=RECIPES, help="the teacher")
    parser.add_argument(
        "--work", type=Path, default=Path("build/teachers"), help="folder for the stages and their checkpoints"
    )
    parser.add_argument(
        "--out", type=Path, help="the finished pipeline's folder, which is replaced; default: WORK/NAME/out"
    )
    parser.add_argument("--steps", type=int, help="transformer steps; may change while less than half are done")
    parser.add_argument("--vae-steps", type=int, help="VAE steps")
    parser.add_argument("--scenes", type=int, help="training scenes to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile: a fifth faster; needs a C++ compiler")
    parser.add_argument("--forecast", action="store_true", help="only say how long it takes on this machine")
    parser.add_argument("--draft", action="store_true", help="only write the last checkpoint's pipeline to --out")
    args = parser.parse_args()
    recipe = RECIPES[args.name]
    given = {"steps": args.steps, "scenes": args.scenes}
    recipe = replace(recipe, **{field: value for field, value in given.items() if value is not None})
    if args.vae_steps is not None:
        recipe = replace(recipe, vae=replace(recipe.vae, steps=args.vae_steps))
    out = args.out or args.work / args.name / "out"
    try:
        if args.draft:
            return draft(args.name, recipe, args.work, out)
        print(forecast(recipe), flush=True)
        if not args.forecast:
            train(args.name, recipe, args.work, out, seed=args.seed, compiled=args.compile)
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
