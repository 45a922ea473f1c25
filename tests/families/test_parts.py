"""The tables of text encoders and VAE name exactly what the classes of transformers and diffusers have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from edgeprune.common.errors import InputError
from edgeprune.families.encoders import CLIP, CLIP_POOLED, QWEN2_5_VL, QWEN3, T5
from edgeprune.families.parts import VAE, VAE_FLUX2, VAE_QWEN_IMAGE, part_shapes, tensor_of, text_outputs, vae_widths

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
WIDTHS: dict[str, Any] = {
    "block_out_channels": [8, 8, 16, 24], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 4,
}  # fmt: skip
NETWORKS = {
    "clip": (CLIP, CLIPTextModelWithProjection, CLIPTextConfig, SMALL | {"projection_dim": 24, "vocab_size": 99}),
    "clip-default": (CLIP, CLIPTextModelWithProjection, CLIPTextConfig, {}),
    "clip-pooled": (CLIP_POOLED, CLIPTextModel, CLIPTextConfig, SMALL | {"max_position_embeddings": 16}),
    "t5": (T5, T5EncoderModel, T5Config, {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 3, "num_heads": 4}),
    "t5-gated": (T5, T5EncoderModel, T5Config, {"feed_forward_proj": "gated-gelu", "num_heads": 9}),
    "qwen3": (QWEN3, Qwen3ForCausalLM, Qwen3Config, SMALL | {"num_key_value_heads": 1, "head_dim": 24}),
    "qwen3-default": (QWEN3, Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "qwen2-vl": (QWEN2_5_VL, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, SMALL | {"num_key_value_heads": 1}),
    "qwen2-vl-apart": (QWEN2_5_VL, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {
        "text_config": SMALL | {"num_key_value_heads": 1, "num_hidden_layers": 2},
    }),
    "vae": (VAE, AutoencoderKL, None, WIDTHS),
    "vae-16": (VAE, AutoencoderKL, None, WIDTHS | {
        "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    }),
    "vae-one-level": (VAE, AutoencoderKL, None, {}),
    "vae-without-attention": (VAE, AutoencoderKL, None, WIDTHS | {"mid_block_add_attention": False}),
    "vae-flux2": (VAE_FLUX2, AutoencoderKLFlux2, None, WIDTHS | {"latent_channels": 8}),
    "vae-flux2-default": (VAE_FLUX2, AutoencoderKLFlux2, None, {}),
    "vae-flux2-small-decoder": (VAE_FLUX2, AutoencoderKLFlux2, None, {
        "decoder_block_out_channels": [96, 192, 384, 384], "sample_size": [512, 512],
    }),
    "vae-qwen-image": (VAE_QWEN_IMAGE, AutoencoderKLQwenImage, None, {
        "base_dim": 8, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [True, False], "z_dim": 4,
    }),
    "vae-qwen-image-default": (VAE_QWEN_IMAGE, AutoencoderKLQwenImage, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_the_vendors(name: str) -> None:
    kind, network, config_class, config = NETWORKS[name]
    with torch.device("meta"):
        model = network(config_class(**config)) if config_class else network(**config)
    state = {tensor_of(kind, n): tuple(t.shape) for n, t in model.state_dict().items()}
    state.pop(None, None)  # what is not needed
    assert part_shapes(kind, config, "config.json") == state


def test_names_that_differ_between_files_of_one_model() -> None:
    assert tensor_of(CLIP, "encoder.layers.0.mlp.fc1.bias") == "text_model.encoder.layers.0.mlp.fc1.bias"
    assert tensor_of(T5, "encoder.embed_tokens.weight") == tensor_of(T5, "shared.weight") == "shared.weight"
    old, new = ("decoder.mid_block.attentions.0." + n for n in ("proj_attn.bias", "to_out.0.bias"))
    assert tensor_of(VAE, old) == tensor_of(VAE, new) == new
    assert tensor_of(VAE, "decoder.mid_block.attentions.0.key.scale") == "decoder.mid_block.attentions.0.key.scale"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CLIP, "text_model.embeddings.position_ids"),
        (CLIP, "vision_model.embeddings.class_embedding"),
        (CLIP_POOLED, "text_projection.weight"),
        (T5, "decoder.block.0.layer.0.SelfAttention.q.weight"),
        (T5, "lm_head.weight"),
        (QWEN3, "lm_head.weight"),
        (QWEN2_5_VL, "lm_head.weight"),
        (QWEN2_5_VL, "visual.blocks.0.attn.qkv.weight"),
        (QWEN2_5_VL, "model.visual.patch_embed.proj.weight"),
        (VAE_FLUX2, "bn.num_batches_tracked"),
    ],
)
def test_the_rest_of_the_model_is_not_needed(kind: str, name: str) -> None:
    assert tensor_of(kind, name) is None


def test_tensors_with_scales_are_no_rest() -> None:
    for name in ("scaled_fp8", "encoder.block.0.layer.0.SelfAttention.q.scale_weight", "text_projection.weight"):
        assert name in {tensor_of(kind, name) for kind in (CLIP, T5)}


def test_the_language_model_has_two_names() -> None:
    old, new = "model.layers.3.self_attn.q_proj.bias", "model.language_model.layers.3.self_attn.q_proj.bias"
    assert tensor_of(QWEN2_5_VL, old) == tensor_of(QWEN2_5_VL, new) == old


def test_widths_of_a_vae() -> None:
    assert vae_widths({"block_out_channels": [8, 16]}) == [8, 16]
    assert vae_widths({"_class_name": VAE_QWEN_IMAGE, "base_dim": 8}) == [8, 16, 32, 32]
    for config in ({}, {"block_out_channels": [8] * 9}):
        with pytest.raises(InputError, match="block_out_channels: found .*expected a list of widths"):
            vae_widths(config)


def test_widths_of_text() -> None:
    assert text_outputs(CLIP, SMALL | {"projection_dim": 24}, "x") == (32, 24)
    assert text_outputs(CLIP_POOLED, SMALL | {"projection_dim": 24}, "x") == (32, 32)
    assert text_outputs(T5, {"d_model": 40}, "x") == (40, 0)
    assert text_outputs(QWEN3, {"hidden_size": 40}, "x") == (40, 0)
    assert text_outputs(QWEN2_5_VL, {"hidden_size": 40}, "x") == (40, 0)
    assert text_outputs(QWEN2_5_VL, {"hidden_size": 8, "text_config": {"hidden_size": 40}}, "x") == (40, 0)
    assert text_outputs(QWEN2_5_VL, {}, "x") == (8192, 0)


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (CLIP, {"hidden_size": "wide"}, "c: hidden_size: found 'wide', expected a whole number"),
        (T5, {"num_layers": 10**9}, "c: num_layers: found 1000000000"),
        (QWEN2_5_VL, SMALL | {"rope_scaling": {"type": "yarn"}}, "c: rope_scaling: found .*expected the type 'mrope'"),
        (QWEN2_5_VL, SMALL | {"num_attention_heads": 3}, "c: num_attention_heads: found 3, expected a divisor of hid"),
        (VAE, {"block_out_channels": []}, r"c: block_out_channels: found \[\]"),
        (VAE_QWEN_IMAGE, {"dim_mult": [0]}, r"c: dim_mult: found \[0\], expected a list of factors"),
        (VAE_QWEN_IMAGE, {"input_channels": 4}, "c: input_channels: found 4, expected 3"),
        (VAE, {"down_block_types": ["AttnDownEncoderBlock2D"]}, "c: down_block_types: found .*1 times DownEncoder"),
    ],
)
def test_impossible_configs_are_refused(kind: str, config: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        part_shapes(kind, config, "c")
    assert part_shapes("UMT5EncoderModel", config, "c") is None
