"""A teacher of Stable Diffusion 3's shape: MMDiT blocks, two CLIP text encoders, no T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from edgeprune.demo.train.networks import clip_config
from edgeprune.demo.train.words import clip_tokenizer, ids_of
from edgeprune.shapes import Grammar

_WIDTH, _HEADS, _TEXT_WIDTH = 128, 4, 64


class Sd3:
    """`blocks` MMDiT blocks of width 128 over 8x8 tokens of `patch` by `patch` latent pixels."""

    # Stock diffusers appends 256 zero tokens where T5 is absent.
    zero_tokens = 256

    def __init__(self, folder: Path, grammar: Grammar, *, tokens: int, blocks: int, patch: int) -> None:
        """Make the networks, and the tokenizer in `folder` if needed."""
        self.tokenizer = clip_tokenizer(folder / "tokenizer", grammar, tokens)
        config = clip_config(len(self.tokenizer), tokens, _TEXT_WIDTH)
        transformer = SD3Transformer2DModel(
            sample_size=8 * patch, patch_size=patch, in_channels=8, out_channels=8, num_layers=blocks,
            attention_head_dim=_WIDTH // _HEADS, num_attention_heads=_HEADS, joint_attention_dim=2 * _TEXT_WIDTH,
            caption_projection_dim=_WIDTH, pooled_projection_dim=2 * _TEXT_WIDTH, pos_embed_max_size=16,
            qk_norm="rms_norm",
        )  # fmt: skip
        encoders = {name: CLIPTextModelWithProjection(config) for name in ("text_encoder", "text_encoder_2")}
        self.modules = torch.nn.ModuleDict({"transformer": transformer} | encoders)

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Tokenize texts; both encoders read the same: (B, 1, M)."""
        return ids_of(self.tokenizer, texts)[:, None]

    def encode(self, modules: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Join both encoders' second last hidden states, and their pooled outputs: (B, M, 128) and (B, 128)."""
        encoders = modules["text_encoder"], modules["text_encoder_2"]
        outputs = [encoder(ids[:, 0], output_hidden_states=True) for encoder in encoders]
        return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o[0] for o in outputs], -1)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        """Return a pipeline without T5."""
        nets = self.modules
        return StableDiffusion3Pipeline(
            transformer=nets["transformer"], scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
            text_encoder=nets["text_encoder"], tokenizer=self.tokenizer,
            text_encoder_2=nets["text_encoder_2"], tokenizer_2=self.tokenizer,
            text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
