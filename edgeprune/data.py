"""What distillation learns from: latents with their encoded prompts, computed once and kept on disk.

Sources: images in one of the layouts of sources/, a text file of prompts for which the teacher makes the images, or
shapes world's own renders. What it leaves out: aspect-ratio buckets, and sources whose latents do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file

from edgeprune.errors import InputError
from edgeprune.files import sha256_file, write_json
from edgeprune.generation import Generation
from edgeprune.resume import save_tensors
from edgeprune.sampling import denoise, encode_prompts, latent_shape, noise, sigmas
from edgeprune.sources import Layout, Skipped, layout_of

Progress = Callable[[int, int], None]
_BATCH = 32
"""Images in memory."""
_UNKNOWN = (
    "--data: {}: found none of these, expected an imagefolder with metadata.jsonl, .tar shards, YE-POP's JSON files, "
    "datasets:NAME, a text file of prompts, or shapes"
)
PROMPTS = Path(__file__).parent / "prompts.txt"


@dataclass(frozen=True)
class Batch:
    """One step's data: latents (B, C, h, w), hidden (B, M, K), pooled (B, P)."""

    latents: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Pairs:
    """All of the data, in memory. Row 0 of the encoded texts is the empty prompt."""

    latents: torch.Tensor
    """(S, C, h, w), normalised."""
    rows: torch.Tensor
    """(S), the text of each sample."""
    hidden: torch.Tensor
    """(T, M, K)."""
    pooled: torch.Tensor
    """(T, P)."""

    def batch(self, size: int, drop: float, generator: torch.Generator) -> Batch:
        """A random batch; a share `drop` of it has the empty prompt."""
        picked = torch.randint(len(self.latents), (size,), generator=generator)
        rows = self.rows[picked].masked_fill(torch.rand(size, generator=generator) < drop, 0)
        return Batch(self.latents[picked], self.hidden[rows], self.pooled[rows])


def read_prompts(path: Path) -> list[str]:
    """Lines of a text file that are not empty.

    Raises:
        InputError: not readable, or no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a list of prompts ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts, expected one a line")
    return prompts


def fitted(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """An image as (H, W, 3), resized and cropped to the middle."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _of_images(
    pipe: Any, layout: Layout, source: str, generation: Generation, most: int, listed: Path, progress: Progress
) -> tuple[torch.Tensor, list[str]]:
    """Latents and texts of a source of images, a batch in memory at a time; what was skipped is listed in a file."""
    latents, texts, skipped = list[torch.Tensor](), list[str](), list[Skipped]()
    waiting: list[NDArray[np.uint8]] = []

    def encode() -> None:
        images = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).contiguous()
        latents.append(encode_images(pipe, images, lambda done, total: None))
        waiting.clear()
        progress(len(texts), len(texts))

    for found in layout.read(source):
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        waiting.append(fitted(found.image, generation.width, generation.height))
        texts.append(found.text)
        if len(waiting) == _BATCH:
            encode()
        if layout.STREAMED and len(texts) == most:
            break
    if waiting:
        encode()
    if not texts:
        why = f": {skipped[0].name}: {skipped[0].why}" if skipped else ""
        raise InputError(f"--data {source}: no image with a caption that can be used{why}")
    write_json(listed, {"used": len(texts), "skipped": [[s.name, s.why] for s in skipped]})
    return torch.cat(latents), texts


@torch.no_grad()
def encode_images(pipe: Any, images: torch.Tensor, progress: Progress, *, batch: int = 32) -> torch.Tensor:
    """uint8 (S, 3, H, W) to normalised latents (S, C, h, w)."""
    parts = []
    config = pipe.vae.config
    for start in range(0, len(images), batch):
        x = images[start : start + batch].to(pipe.vae.dtype) / 127.5 - 1
        parts.append((pipe.vae.encode(x).latent_dist.mean.float() - config.shift_factor) * config.scaling_factor)
        progress(min(start + batch, len(images)), len(images))
    return torch.cat(parts)


def _teacher_made(
    pipe: Any, prompts: list[str], generation: Generation, progress: Progress, *, batch: int = 32
) -> torch.Tensor:
    condition = encode_prompts(pipe, prompts, generation.max_sequence_length)
    empty = encode_prompts(pipe, [""], generation.max_sequence_length)
    shape = latent_shape(pipe, generation)
    levels = sigmas(pipe, generation.num_inference_steps, shape)
    parts = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        x = noise(list(range(start, start + len(prompts[rows]))), shape).to(condition.hidden)
        *_, (latents, _) = denoise(pipe.transformer, x, levels, condition[rows], empty, generation.guidance_scale)
        parts.append(latents)
        progress(min(start + batch, len(prompts)), len(prompts))
    return torch.cat(parts)


def source_digest(source: str) -> str:
    """Identity of a source's content: of images, by name, size and time of change."""
    path = Path(source)
    if source == "shapes":
        return source
    if layout := layout_of(source):
        return layout.identity(source)
    if path.is_file():
        return sha256_file(path)
    raise InputError(_UNKNOWN.format(source))


def make_pairs(
    pipe: Any,
    source: str,
    generation: Generation,
    cache: Path,
    *,
    samples: int,
    progress: Progress = lambda done, total: None,
) -> Pairs:
    """Latents and texts from a source, computed once; `cache` is read if it is there.

    Args:
        source: `shapes`, images in a layout of sources/, or a file of prompts.
        samples: how many images to make (`shapes`, prompts) or to take of a stream; a folder is taken whole.
    """
    if not cache.exists():
        if source == "shapes":
            from edgeprune.demo.shapes import training_scenes

            rendered, texts = training_scenes(samples, seed=7)
            images = torch.from_numpy(rendered).permute(0, 3, 1, 2).contiguous()
            latents = encode_images(pipe, images, progress)
        elif layout := layout_of(source):
            listed = cache.with_suffix(".json")
            latents, texts = _of_images(pipe, layout, source, generation, samples, listed, progress)
        elif Path(source).is_file():
            prompts = read_prompts(Path(source))
            texts = [prompts[i % len(prompts)] for i in range(samples)]
            latents = _teacher_made(pipe, texts, generation, progress)
        else:
            raise InputError(_UNKNOWN.format(source))
        unique = ["", *sorted(set(texts) - {""})]
        index = {t: i for i, t in enumerate(unique)}
        encoded = encode_prompts(pipe, unique, generation.max_sequence_length)
        rows = torch.tensor([index[t] for t in texts])
        save_tensors(cache, {"latents": latents, "rows": rows, "hidden": encoded.hidden, "pooled": encoded.pooled})
    data = load_file(cache)
    return Pairs(data["latents"], data["rows"], data["hidden"], data["pooled"])
