"""What a training loop asks of a teacher's networks; sd3.py and flux.py answer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextConfig


class Networks(Protocol):
    """Text encoders and a transformer that are trained together."""

    modules: torch.nn.ModuleDict
    """`transformer`, `text_encoder` and `text_encoder_2`, as in the pipeline."""
    zero_tokens: int
    """Text tokens of zeros that the pipeline may append; 0 for none."""

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Tokenize texts for every tokenizer: (B, tokenizers, M)."""

    def encode(self, modules: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids as the pipeline does: hidden states (B, M, K) and pooled text (B, P).

        Args:
            modules: these networks, or others with their names.
            ids: of texts.
        """

    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """Return a pipeline of the networks and a VAE."""


def clip_config(words: int, tokens: int, width: int) -> CLIPTextConfig:
    """Return the config of a CLIP text encoder of three layers, whose last token ends a text."""
    return CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=tokens,
        bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1,
    )  # fmt: skip
