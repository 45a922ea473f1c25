"""A teacher of FLUX.1 dev's shape: two-stream and single-stream blocks, CLIP and T5, guidance as an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from edgeprune.demo.train.networks import clip_config
from edgeprune.demo.train.words import clip_tokenizer, ids_of, t5_tokenizer
from edgeprune.shapes import Grammar

_WIDTH, _HEADS, _CLIP_WIDTH, _T5_WIDTH = 192, 6, 64, 128
_CHANNELS = 8


class Flux:
    """`joint` two-stream blocks and `single` single-stream blocks of width 192, over 8x8 tokens of 2x2 latents."""

    zero_tokens = 0

    def __init__(self, folder: Path, grammar: Grammar, *, tokens: int, joint: int, single: int) -> None:
        """Make the networks, and the tokenizers in `folder` if needed."""
        self.clip = clip_tokenizer(folder / "tokenizer", grammar, tokens)
        self.t5 = t5_tokenizer(folder / "tokenizer_2", grammar, tokens)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4 * _CHANNELS, num_layers=joint, num_single_layers=single,
            attention_head_dim=_WIDTH // _HEADS, num_attention_heads=_HEADS, joint_attention_dim=_T5_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
        t5 = T5Config(
            vocab_size=len(self.t5), d_model=_T5_WIDTH, d_kv=32, d_ff=2 * _T5_WIDTH, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False,
        )  # fmt: skip
        encoders = {
            "text_encoder": CLIPTextModel(clip_config(len(self.clip), tokens, _CLIP_WIDTH)),
            "text_encoder_2": T5EncoderModel(t5),
        }
        self.modules = torch.nn.ModuleDict({"transformer": transformer} | encoders)

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Tokenize texts for CLIP and for T5: (B, 2, M)."""
        return torch.stack([ids_of(tokenizer, texts) for tokenizer in (self.clip, self.t5)], 1)

    def encode(self, modules: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5's last hidden states (B, M, 128), and CLIP's pooled text (B, 64)."""
        return modules["text_encoder_2"](ids[:, 1])[0], modules["text_encoder"](ids[:, 0]).pooler_output

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        """Return a pipeline; its noise levels are evenly spaced, as in training."""
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae, transformer=self.modules["transformer"],
            text_encoder=self.modules["text_encoder"], tokenizer=self.clip,
            text_encoder_2=self.modules["text_encoder_2"], tokenizer_2=self.t5,
        )  # fmt: skip
