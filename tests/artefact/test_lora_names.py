"""Every trainer's name leads to the same layer, and fused layers are laid out as in diffusers' own conversions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from loras import names_of, pair, read_tensors
from tiny import KINDS

from edgeprune.artefact.lora.names import TRANSFORMER, Names, _originals
from edgeprune.families import family_of

WIDE = {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 8, "in_channels": 4}
"""diffusers' conversion of FLUX.1 knows this width alone."""
CONVERSIONS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "sd3": (
        {
            "_class_name": "SD3Transformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4,
            "num_layers": 2, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm", "in_channels": 4, "patch_size": 2,
            "pos_embed_max_size": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "caption_projection_dim": 8,
        },
        convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "flux": (
        WIDE | {
            "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True,
            "pooled_projection_dim": 8,
        },
        convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "flux2": (
        WIDE | {
            "_class_name": "Flux2Transformer2DModel", "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True,
        },
        convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "z-image": (
        {
            "_class_name": "ZImageTransformer2DModel", "dim": 12, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "in_channels": 1, "cap_feat_dim": 8, "axes_dims": [2, 2, 2], "axes_lens": [64, 8, 8],
        },
        convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}  # fmt: skip
PLAIN = ("flux2", "z-image")
"""Whose conversions take neither position tables nor biases."""


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_layers_lie_as_in_the_conversion_of_whole_checkpoints(kind: str) -> None:
    config, convert = CONVERSIONS[kind]
    names, family = Names(family_of(config), config, {}), family_of(config)
    shapes = names.shapes[TRANSFORMER]
    originals = {
        name: sum(shapes[f"{layer}.weight"][0] for layer in layers)
        for name, layers in _originals(family, shapes, family.block_count(config))
        if "processor" not in name and not name.startswith(("transformer_blocks", "single_transformer_blocks"))
    }
    checkpoint: dict[str, torch.Tensor] = {} if kind in PLAIN else {"pos_embed": torch.zeros(1)}
    rows: dict[str, torch.Tensor] = {}
    for place, (name, count) in enumerate(originals.items()):
        rows[name] = torch.arange(count, dtype=torch.float64) + 100_000 * place
        scale = name.endswith("_norm") and kind != "z-image"
        checkpoint[f"{name}.scale" if scale else f"{name}.weight"] = rows[name][:, None]
        if kind not in PLAIN:
            checkpoint[f"{name}.bias"] = rows[name]
    if kind == "sd3":
        checkpoint["context_embedder.weight"] = checkpoint["context_embedder.bias"] = torch.zeros(8, 1)
    expected = {n: t for n, t in convert(checkpoint).items() if n.endswith(".weight") and n in shapes}
    found = {}
    for name, tags in rows.items():
        for target in names.find(name)[1]:
            cut = tags if target.rows is None else torch.cat([tags[a:b] for a, b in target.rows])
            found[f"{target.layer}.weight"] = cut
    assert found.keys() == expected.keys() - {"context_embedder.weight"} | (found.keys() & {"context_embedder.weight"})
    for name, tags in found.items():
        assert torch.equal(tags, expected[name].flatten()), name
    weights = {name for name in shapes if name.endswith(".weight") and (kind != "z-image" or name in expected)}
    assert weights - {"context_embedder.weight"} == found.keys() - {"context_embedder.weight"}


SPELLINGS = {
    "kohya": ("lora_unet_{flat}", "lora_down.weight", "lora_up.weight"),
    "onetrainer": ("lora_transformer_{flat}", "lora_down.weight", "lora_up.weight"),
    "lycoris": ("lycoris_{flat}", "lora_down.weight", "lora_up.weight"),
    "comfyui": ("diffusion_model.{name}", "lora_down.weight", "lora_up.weight"),
    "checkpoint": ("model.diffusion_model.{name}", "lora_A.weight", "lora_B.weight"),
    "bare": ("{name}", "lora_A.weight", "lora_B.weight"),
    "peft": ("base_model.model.{name}", "lora_A.weight", "lora_B.weight"),
    "peft-named": ("base_model.model.transformer.{name}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": ("transformer.{name}", "lora_A.weight", "lora_B.weight"),
    "diffusers-old": ("transformer.{name}", "lora.down.weight", "lora.up.weight"),
}
LAYERS = {
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "joint_blocks.2.context_block.mlp.fc2": ("ff_context.net.2",),
        "joint_blocks.1.context_block.adaLN_modulation.1": ("norm1_context.linear",),
        "transformer_blocks.0.attn.to_out.0": ("attn.to_out.0",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    },
    "flux": {
        "double_blocks.1.txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "single_blocks.2.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_transformer_blocks.0.proj_out": ("proj_out",),
        "transformer_blocks.1.attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    "flux2": {
        "double_blocks.0.img_mlp.0": ("ff.linear_in",),
        "single_blocks.1.linear2": ("attn.to_out",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "img_in": ("x_embedder",),
    },
    "qwen-image": {
        "transformer_blocks.1.attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "transformer_blocks.2.txt_mlp.net.0.proj": ("txt_mlp.net.0.proj",),
        "transformer_blocks.0.img_mod.1": ("img_mod.1",),
        "img_in": ("img_in",),
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_spelling_is_the_same_lora(tmp_path: Path, kind: str, spelling: str) -> None:
    names = names_of(KINDS[kind]())
    prefix, down, up = SPELLINGS[spelling]
    tensors: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for seed, (name, ends) in enumerate(LAYERS[kind].items()):
        part, targets = names.find(name)
        assert part == TRANSFORMER
        assert all(target.layer.endswith(end) for target, end in zip(targets, ends, strict=True))
        shapes = [names.shapes[part][f"{t.layer}.weight"] for t in targets]
        made = pair(name, sum(s[0] for s in shapes), shapes[0][1], seed=seed)
        spelled = prefix.format(name=name, flat=name.replace(".", "_"))
        tensors |= {
            k.replace(name, spelled).replace("lora_down.weight", down).replace("lora_up.weight", up): t
            for k, t in made.items()
        }
        difference = made[f"{name}.lora_up.weight"] @ made[f"{name}.lora_down.weight"] * made[f"{name}.alpha"] / 4
        for target in targets:
            whole[target.layer] = torch.cat([difference[a:b] for a, b in target.rows or ((0, len(difference)),)])
    lora = read_tensors(tmp_path, tensors, names)
    assert {change.layer for change in lora.changes} == whole.keys() and lora.tensors == len(tensors)
    for change in lora.changes:
        assert change.up is not None and change.down is not None
        torch.testing.assert_close(change.up @ change.down, whole[change.layer])


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_layers_share_a_name(kind: str) -> None:
    """A name with underscores could mean two layers, but none does."""
    names = names_of(KINDS[kind]())
    layers = [name.removesuffix(".weight") for name in names.shapes[TRANSFORMER] if name.endswith(".weight")]
    assert [names.find(f"lora_unet_{layer.replace('.', '_')}")[1][0].layer for layer in layers] == layers


def test_text_encoders_are_found_by_name_or_number() -> None:
    clip, t5 = (
        {"text_model.encoder.layers.0.mlp.fc1.weight": (64, 32)},
        {"encoder.block.0.layer.0.SelfAttention.q.weight": (32, 96)},
    )
    flat = {name.removeprefix("text_model."): shape for name, shape in clip.items()}  # as newer transformers write it
    sd3 = names_of(KINDS["sd3"](), {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5})
    flux = names_of(KINDS["flux"](), {"text_encoder": flat, "text_encoder_2": t5})
    fc1, q = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    for names, first in ((sd3, fc1), (flux, fc1.removeprefix("text_model."))):
        last = "text_encoder_3" if names is sd3 else "text_encoder_2"
        for name in ("lora_te_", "lora_te1_"):
            assert [t.layer for t in names.find(name + fc1.replace(".", "_"))[1]] == [first]
        for name in (f"text_encoder.{fc1}", f"text_encoders.clip_l.transformer.{fc1}"):
            part, (target,) = names.find(name)
            assert (part, target.layer) == ("text_encoder", first)
        for name in (f"lora_te3_{q.replace('.', '_')}", f"text_encoders.t5xxl.transformer.{q}", f"{last}.{q}"):
            part, (target,) = names.find(name)
            assert (part, target.layer) == (last, q)
    assert sd3.find(f"text_encoders.clip_g.transformer.{fc1}")[0] == "text_encoder_2"
    assert flux.find(f"lora_te2_{q.replace('.', '_')}")[1][0].layer == q
