"""The VAE: factor 8, 8 latent channels, 0.6 M parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from edgeprune.common.splits import Split
from edgeprune.demo.train.loop import CHECKPOINT_STEPS, ProgressLine, descend, falling
from edgeprune.demo.train.scenes import scenes, to_unit
from edgeprune.shapes import BACKGROUND, World
from edgeprune.training.resume import load_state, save_state, step_generator

_PIXELS = 16 * 64 * 64
"""Pixels of a batch."""


def make_vae(size: int) -> AutoencoderKL:
    """Return an untrained VAE for images of `size` pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=size,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(
    folder: Path,
    world: World,
    splits: Sequence[Split],
    *,
    steps: int,
    seed: int,
    count: int,
    rate: float,
    start: Path | None = None,
) -> AutoencoderKL:
    """Return the folder's VAE; train it if needed: L1 + L2 (ink counts five times) + 1e-5 KL; AdamW.

    The mean and the standard deviation of the latents go into the config.

    Args:
        folder: for the VAE and its checkpoints.
        world: whose scenes it learns.
        splits: of the scenes.
        steps: of 65,536 pixels each.
        seed: of everything random.
        count: scenes to render.
        rate: the highest learning rate.
        start: a pipeline whose VAE it starts from; None for random weights.
    """
    if (folder / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(seed)
    vae = make_vae(world.size)
    if start is not None:
        weights = load_file(start / "vae" / "diffusion_pytorch_model.safetensors")
        vae.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    images, _ = scenes(world, splits, count, (seed, 0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint, step = folder / "vae.safetensors", 0
    if checkpoint.exists():
        modules, meta = load_state(checkpoint, optimizer)
        vae.load_state_dict(modules["vae"])
        step = meta["step"]
    background = to_unit(torch.tensor(BACKGROUND)).view(1, 3, 1, 1)
    progress = ProgressLine("vae", step, steps)
    while step < steps:
        generator = step_generator(seed, step)
        x = to_unit(images[torch.randint(len(images), (_PIXELS // world.size**2,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        recon = vae.decode(posterior.mean + posterior.std * noise).sample
        # Ink is a tenth of the pixels, and small shapes must keep their colour.
        weight = 1 + 4 * ((x - background).abs().amax(1, keepdim=True) > 0.1).float()
        error = recon - x
        loss = (weight * (error.abs() + error.square())).mean() + 1e-5 * posterior.kl().mean()
        descend(loss, vae, optimizer, rate=falling(step, steps, rate))
        step += 1
        progress(step, loss.item())
        if step % CHECKPOINT_STEPS == 0 or step == steps:
            save_state(checkpoint, {"vae": vae.state_dict()}, optimizer, {"step": step})
    vae.eval()
    with torch.no_grad():
        means = torch.cat([vae.encode(to_unit(b)).latent_dist.mean for b in images[:512].split(32)])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
    vae.save_pretrained(folder / "vae.tmp")
    (folder / "vae.tmp").rename(folder / "vae")
    return vae
