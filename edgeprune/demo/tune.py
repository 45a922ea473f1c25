"""Tunes the trained teacher on corrections of what it draws: python -m edgeprune.demo.tune --start DIR --out DIR.

Flow matching leaves a model that draws clean things, but not always those of the prompt ("a square and a triangle"
gives two triangles). Here, in rounds, it draws training prompts from known noise; each drawing is replaced by the true
scene that is most like it (`shapes.nearest_render`), and flow matching goes on with those pairs of noise and scene. The
targets are nearly a function of the noise, so a step teaches much more than one with a scene picked at random, and it
teaches at what the model itself does, as DAgger does for policies (Ross et al. 2011, arXiv 1011.0686). Held-out prompts
are never drawn. Drawing uses no guidance, and neither does the tuned model. The text encoders learn faster than the
transformer: the trained ones tell "above" from "below" by a hundredth of a caption's embedding. The VAE stays as it is.
A killed run goes on from its last checkpoint (every 10 rounds).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from edgeprune import checkpoint
from edgeprune.demo import shapes
from edgeprune.demo.train import (
    GENERATION,
    TOKENS,
    Progress,
    encode_text,
    falling,
    save_pipeline,
    set_rate,
    to_unit,
)
from edgeprune.resume import Ema, load_state, save_state, step_generator
from edgeprune.sampling import Conditioning, decode, denoise, sigmas

DRAWINGS, BATCH = 256, 32
"""Prompts drawn in a round; drawings in a training step."""
PASSES = 6
"""Times that a drawing's correction is learnt, each at another noise level."""
TEXT_FACTOR = 5.0
"""Of the text encoders' learning rate."""
STEPS = 12
"""Euler steps of a drawing."""
WEIGHTS = {
    "single_object": 0.5,
    "two_objects": 2.0,
    "counting": 2.0,
    "colors": 0.5,
    "position": 3.0,
    "color_attribution": 2.5,
    "typography": 0.5,
}


def pick_prompts(count: int, rng: np.random.Generator) -> list[shapes.Prompt]:
    """Training prompts, in any phrasing."""
    weights = np.asarray([WEIGHTS[t] for t in shapes.TASKS])
    out = []
    for task in rng.choice(shapes.TASKS, size=count, p=weights / weights.sum()):
        pool = shapes.split(str(task), held_out=False)
        prompt = pool[rng.integers(len(pool))]
        template = shapes.TEMPLATES[rng.choice(len(shapes.TEMPLATES), p=[0.6, 0.2, 0.2])]
        out.append(shapes.Prompt(template.format(prompt.text), prompt.meaning))
    return out


def corrected(
    drawings: NDArray[np.uint8], prompts: list[shapes.Prompt], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The nearest true scenes (P, 64, 64, 3), and which drawings were right already (P,)."""
    pairs = list(zip(drawings, [p.meaning for p in prompts], strict=True))
    scenes = np.stack([shapes.nearest_render(pixels, meaning, rng) for pixels, meaning in pairs])
    return scenes, np.asarray([shapes.check(pixels, meaning) for pixels, meaning in pairs], dtype=float)


@torch.no_grad()
def encode(vae: Any, images: NDArray[np.uint8]) -> torch.Tensor:
    """Images (P, 64, 64, 3) to latents as the transformer sees them: (P, 8, 8, 8)."""
    pixels = to_unit(torch.from_numpy(images).permute(0, 3, 1, 2))
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    latents: torch.Tensor = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def tune(start: Path, work: Path, *, rounds: int, seed: int, rate: float, compiled: bool, bf16: bool) -> Any:
    """`rounds` of drawing, correcting and learning; returns the tuned pipeline."""
    pipe = checkpoint.load(start)
    model, encoders = pipe.transformer, [pipe.text_encoder, pipe.text_encoder_2]
    nets = torch.nn.ModuleDict({"transformer": model, "text_encoder": encoders[0], "text_encoder_2": encoders[1]})
    nets.train().requires_grad_(True)
    texts = [p for encoder in encoders for p in encoder.parameters()]
    groups = [{"params": list(model.parameters())}, {"params": texts, "factor": TEXT_FACTOR}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ema = Ema(dict(nets.named_parameters()), 0.998)
    compiled_model = torch.compile(model) if compiled else model
    file, done, steps = work / "tune.safetensors", 0, 0
    if file.exists():
        modules, meta = load_state(file, optimizer)
        nets.load_state_dict(modules["nets"])
        ema.load(modules["ema"])
        done, steps = meta["round"], meta["step"]

    def predict(x: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return (compiled_model(x, hidden, pooled, timestep, return_dict=False)[0].float(),)

    levels = sigmas(pipe, STEPS, (8, 8, 8))
    progress = Progress("tune", done, rounds, every=1)
    while done < rounds:
        rng, g = np.random.default_rng([seed, done]), step_generator(seed + 7, done)
        prompts = pick_prompts(DRAWINGS, rng)
        ids = pipe.tokenizer(
            [p.text for p in prompts], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            condition = Conditioning(*encode_text(encoders, ids))
        noise = torch.randn((DRAWINGS, 8, 8, 8), generator=g)
        drawn = [
            list(denoise(predict, noise[rows], levels, condition[rows], condition[rows], 1.0))[-1][0]
            for rows in torch.arange(DRAWINGS).split(BATCH)
        ]
        pixels = np.concatenate([decode(pipe, part) for part in drawn])
        scenes, right = corrected(pixels, prompts, rng)
        clean = encode(pipe.vae, scenes)
        for picked in torch.cat([torch.randperm(DRAWINGS, generator=g) for _ in range(PASSES)]).split(BATCH):
            sigma = torch.rand(BATCH, generator=g).sqrt()  # which thing goes where is settled at high noise
            mixed = torch.lerp(clean[picked], noise[picked], sigma.view(-1, 1, 1, 1))
            velocity = predict(mixed, *encode_text(encoders, ids[picked]), sigma * 1000)[0]
            loss = F.mse_loss(velocity, noise[picked] - clean[picked])
            set_rate(optimizer, falling(done, rounds, rate, warmup=3))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
            optimizer.step()
            ema.update(steps)
            steps += 1
        done += 1
        means = shapes.task_means(right, [p.meaning.task for p in prompts])
        print(" ".join(f"{task} {mean:.2f}" for task, mean in means.items()), f"right {right.mean():.3f}", flush=True)
        progress(done, loss.item())
        if done % 10 == 0 or done == rounds:
            modules = {"nets": nets.state_dict(), "ema": ema.average}
            save_state(file, modules, optimizer, {"round": done, "step": steps})
    nets.load_state_dict(nets.state_dict() | ema.average)
    nets.eval()
    return pipe


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.demo.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=Path, default=checkpoint.BUILTIN, help="the trained pipeline")
    parser.add_argument("--work", type=Path, default=Path("build/teacher"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, help="write the tuned pipeline here, in half precision")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    parser.add_argument("--bf16", action="store_true", help="autocast: faster where bf16 is native")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = tune(
        args.start, args.work, rounds=args.rounds, seed=args.seed, rate=args.rate,
        compiled=args.compile, bf16=args.bf16,
    )  # fmt: skip
    if args.out:
        save_pipeline(pipe, args.out, GENERATION | {"guidance_scale": 1.0})


if __name__ == "__main__":
    main()
