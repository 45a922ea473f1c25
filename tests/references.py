"""Tiny random pipelines of architectures that edgeprune has no family for, saved as folders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from tiny import T5_WIDTH, tiny_t5, tiny_t5_tokenizer, tiny_vae
from transformers import Gemma2Config, Gemma2Model

GENERATION = {"num_inference_steps": 2, "height": 64, "width": 64}


def tiny_sana_sprint(folder: Path) -> Any:
    """Make a SANA-Sprint whose VAE has the published factor of 32: its pipeline draws 1024x1024 and shrinks that."""
    torch.manual_seed(10)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=T5_WIDTH,
        sample_size=32, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    widths, layers = (4, 4, 4, 4, 8, 8), (1,) * 6
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=layers, decoder_layers_per_block=layers, encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6, scaling_factor=0.4,
    )  # fmt: skip
    tokenizer = tiny_t5_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=T5_WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    pipe = SanaSprintPipeline(tokenizer, Gemma2Model(encoder), vae, transformer, SCMScheduler())
    return _save(pipe, folder)


def tiny_chroma(folder: Path) -> Any:
    """Make a Chroma with the VAE and the T5 of `tiny`."""
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers' own about a class that it uses
        transformer = ChromaTransformer2DModel(
            in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=T5_WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1,
        )  # fmt: skip
    tokenizer = tiny_t5_tokenizer()
    encoder = tiny_t5(len(tokenizer))
    return _save(ChromaPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), encoder, tokenizer, transformer), folder)


def tiny_pixart_sigma(folder: Path) -> Any:
    """Make a PixArt-Sigma, whose noise is predicted and whose pipeline draws 256x256 and shrinks that."""
    torch.manual_seed(12)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=32, sample_size=32, caption_channels=T5_WIDTH, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    tokenizer = tiny_t5_tokenizer()
    encoder = tiny_t5(len(tokenizer))
    return _save(PixArtSigmaPipeline(tokenizer, encoder, vae, transformer, DPMSolverMultistepScheduler()), folder)


REFERENCES: dict[str, Callable[[Path], Any]] = {
    "sana-sprint": tiny_sana_sprint,
    "chroma": tiny_chroma,
    "pixart-sigma": tiny_pixart_sigma,
}


def _save(pipe: Any, folder: Path) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    return pipe
