"""Repositories as they are on the hub: a model, and beside it the same weights in other files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from tiny import tiny_pipeline

DOUBLES = (
    "sd3.5_large.safetensors",  # a single file
    "text_encoders/t5xxl_fp16.safetensors",  # another program's folder
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/flax_model.msgpack",
    "text_encoder/onnx/model.onnx",
    "text_encoder/model.onnx",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bf16.safetensors",
    "transformer/diffusion_pytorch_model.bin.index.json",
    "transformer/consolidated.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.non_ema.safetensors",
    "images/sample.png",
    "workflow.json",
)
"""Files that are not read."""


def with_doubles(folder: Path) -> Path:
    """Make a tiny model whose folder has DOUBLES, a card and licenses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in dependencies
        tiny_pipeline(folder)
    for name in DOUBLES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"\1" * 5000)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: TERMS-OF-USE\n---\n")
    for name in ("LICENSE.md", "TERMS-OF-USE", "vae/LICENSE"):
        (folder / name).write_text("Terms.\n")
    return folder


def as_variant(source: Path, folder: Path, variant: str, *, shard: str | None = None) -> Path:
    """Save a tiny model again with its weights as a variant alone."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            source, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float16
        )
        pipe.save_pretrained(folder, variant=variant, **({"max_shard_size": shard} if shard else {}))
    shutil.copy(source / "generation.json", folder / "generation.json")
    return folder
