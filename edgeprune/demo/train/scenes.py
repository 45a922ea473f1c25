"""Rendered scenes, and their latents, which are computed once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from edgeprune.common.splits import Split
from edgeprune.shapes import World

_TOGETHER = 1000
"""Scenes in memory at once."""


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float in -1..1."""
    return images.float() / 127.5 - 1


def scenes(world: World, splits: Sequence[Split], count: int, seed: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """Return scenes of these splits, uint8 (count, 3, size, size), and their plain captions."""
    images, captions = world.training_scenes(count, seed, splits)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def make_latents(
    folder: Path, vae: AutoencoderKL, world: World, splits: Sequence[Split], *, count: int, seed: int
) -> tuple[torch.Tensor, list[str]]:
    """Return normalised latents of `count` scenes, half precision (count, C, h, w), and their captions."""
    path, captions_path = folder / "latents.safetensors", folder / "captions.json"
    if not path.exists():
        parts, captions = [], []
        for images, texts in _batches(world, splits, count, seed):
            with torch.no_grad():
                means = torch.cat([vae.encode(to_unit(batch)).latent_dist.mean for batch in images.split(20)])
            parts.append(((means - vae.config.shift_factor) * vae.config.scaling_factor).half())
            captions += texts
            print(f"scenes {len(captions)}/{count}", flush=True)
        captions_path.write_text(json.dumps(captions))
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"], json.loads(captions_path.read_text())


def _batches(world: World, splits: Sequence[Split], count: int, seed: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for index, first in enumerate(range(0, count, _TOGETHER)):
        yield scenes(world, splits, min(_TOGETHER, count - first), (seed, index))
