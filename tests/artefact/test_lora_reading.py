"""A LoRA file is read whole, with the scale of each layer, or refused with the names of what cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import Tensors, names_of, pair, read_tensors
from safetensors.torch import save_file
from tiny import KINDS

from edgeprune.artefact.lora.reading import read
from edgeprune.common.errors import InputError

PROJ = "lora_unet_double_blocks_0_img_attn_proj"
ATTN = "transformer.transformer_blocks.0.attn"
PEFT = "base_model.model.transformer_blocks.0.attn"


def half(tensors: Tensors, without: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if without not in name}


REFUSED: dict[str, tuple[Tensors, str]] = {
    "lokr": (
        {f"{PROJ}.lokr_w1": torch.ones(4, 4), f"{PROJ}.lokr_w2": torch.ones(16, 16), f"{PROJ}.alpha": torch.ones(())},
        r"found LoKr \('.*lokr_w1', '.*lokr_w2'\), expected LoRA or DoRA",
    ),
    "loha": (
        pair(PROJ, 64, 64) | {f"{PROJ.replace('proj', 'qkv')}.hada_w1_a": torch.ones(64, 4)},
        r"found LoHa \('.*hada_w1_a'\)",
    ),
    "oft": ({f"{ATTN}.to_q.oft_R.weight": torch.ones(4, 6)}, r"found OFT \("),
    "ia3": ({f"{PROJ}.weight": torch.ones(64), f"{PROJ}.on_input": torch.tensor(0.0)}, r"found \(IA\)\^3 \("),
    "ia3-peft": ({f"{PEFT}.to_k.ia3_l": torch.ones(64, 1)}, r"found \(IA\)\^3 \("),
    "glora": (
        {f"{PROJ}.{n}.weight": torch.ones(4, 4) for n in ("a1", "a2", "b1", "b2")},
        r"found GLoRA \(.* and 2 more",
    ),
    "tucker": (pair(PROJ, 64, 64) | {f"{PROJ}.lora_mid.weight": torch.ones(4, 4)}, "found a Tucker decomposition"),
    "control": (
        pair("double_blocks.0.img_attn.proj", 64, 64)
        | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(32)},
        r"found whole weights \('.*key_norm.scale'\), expected a LoRA",
    ),
    "model": ({"double_blocks.0.img_attn.proj.weight": torch.ones(64, 64)}, r"found whole weights \("),
    "noise": (pair(PROJ, 64, 64) | {"emb_params": torch.ones(2, 4)}, r"found 'emb_params', expected LoRA, DoRA"),
    "sd3": (
        pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 192, 64),
        r"3 of 3 tensors \('lora_unet_joint_.*' and 1 more\) are for .* names of SD3",
    ),
    "sdxl": (
        pair("lora_unet_down_blocks_1_attentions_0_proj_in", 64, 64),
        "found names of Stable Diffusion 1, 2 or XL",
    ),
    "qwen-image": (pair("diffusion_model.layers.3.attn.to_q", 64, 64), "found names of another model"),
    "too-many-blocks": (
        pair(PROJ, 64, 64) | pair(PROJ.replace("_0_", "_18_"), 64, 64),
        r"3 of 6 tensors \('lora_unet_double_blocks_18",
    ),
    "size": (pair(PROJ, 3072, 3072), r"lora_down.weight: found \(4, 3072\), expected \(rank, 64\)"),
    "transposed": (
        {f"{ATTN}.to_q.lora_A.weight": torch.ones(64, 4), f"{ATTN}.to_q.lora_B.weight": torch.ones(4, 64)},
        r"to_q.lora_A.weight: found \(64, 4\), expected \(rank, 64\)",
    ),
    "fused-size": (pair("lora_unet_single_blocks_0_linear1", 192, 64), r"found \(192, 4\), expected \(448, 4"),
    "half": (half(pair(PROJ, 64, 64), "up"), "found only one half of a LoRA"),
    "alpha-alone": (half(pair(PROJ, 64, 64), ".lora_"), "found only one half of a LoRA"),
    "alphas": (pair(PROJ, 64, 64) | {f"{PROJ}.alpha": torch.ones(2)}, r"alpha: found \(2,\), expected one number"),
    "nan": (pair(PROJ, 64, 64) | {f"{PROJ}.lora_up.weight": torch.full((64, 4), torch.nan)}, "found NaN or infinity"),
    "integers": (pair(PROJ, 64, 64) | {f"{PROJ}.diff_b": torch.ones(64, dtype=torch.int32)}, "found I32, expected"),
    "twice": (pair(PROJ, 64, 64) | pair(f"{ATTN}.to_out.0", 64, 64, seed=1), r"for one layer, transformer_blocks.0"),
    "adapters": (
        half(pair(f"{ATTN}.to_q", 64, 64), "alpha")
        | {f"{ATTN}.to_q.lora_A.{name}.weight": torch.ones(4, 64) for name in ("style", "other")},
        "expected a file of one adapter",
    ),
    "magnitude": (
        pair(PROJ, 64, 64) | {f"{PROJ}.dora_scale": torch.ones(3, 1)},
        r"dora_scale: found \(3, 1\), expected \(64, 1\)",
    ),
    "magnitude-alone": ({f"{PROJ}.dora_scale": torch.ones(64, 1)}, "found a magnitude of DoRA without its lora_A"),
    "magnitude-of-columns": (
        pair("lora_unet_double_blocks_0_img_attn_qkv", 192, 64)
        | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(1, 64)},
        "columns of fused layers cannot be told apart",
    ),
    "bias": (pair(PROJ, 64, 64) | {f"{PROJ}.diff_b": torch.ones(65)}, r"diff_b: found \(65,\), expected \(64,\)"),
    "absent-encoder": (pair("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", 8, 8), "has no text_encoder_3"),
    "empty": ({}, "nothing of it concerns the model: it is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        read_tensors(tmp_path, tensors, names_of(KINDS["flux"]()))
    assert str(caught.value).startswith(f"{tmp_path}/lora.safetensors: ") and "\n" not in str(caught.value)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    names = names_of(KINDS["flux"]())
    with pytest.raises(InputError, match=r"found \.pt, expected a \.safetensors file; pickles are not read"):
        read(tmp_path / "style.pt", names)
    with pytest.raises(InputError, match=r"style.safetensors: no such file"):
        read(tmp_path / "style.safetensors", names)
    (tmp_path / "style.safetensors").write_bytes(b"<!doctype html>")
    with pytest.raises(InputError, match=r"style.safetensors: not whole safetensors"):
        read(tmp_path / "style.safetensors", names)


def test_tensors_without_effect_are_listed(tmp_path: Path) -> None:
    """Some trainers write zeros for layers that they do not train, and T5 for pipelines that may lack it."""
    zero = {name: tensor * ("up" not in name) for name, tensor in pair("lora_unet_pos_emb", 64, 64).items()}
    t5 = pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 32, 96)
    lora = read_tensors(tmp_path, pair("lora_unet_context_embedder", 64, 64) | zero | t5, names_of(KINDS["sd3"]()))
    assert lora.unused == dict.fromkeys(zero, "all zero, for a layer that the model lacks") | dict.fromkeys(
        t5, "the pipeline has no text_encoder_3"
    )
    assert [change.layer for change in lora.changes] == ["context_embedder"] and lora.tensors == 9


def scale_of(folder: Path, tensors: Tensors, metadata: dict[str, Any] | None = None) -> dict[str, float]:
    """Return the scale of each layer, of which B is all ones."""
    tensors = {name: torch.ones_like(tensor) if "alpha" not in name else tensor for name, tensor in tensors.items()}
    text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    lora = read_tensors(folder, tensors, names_of(KINDS["flux"]()), text)
    return {c.layer.rpartition(".")[2]: float(c.up.mean()) for c in lora.changes if c.up is not None}


def test_alphas_and_ranks_by_layer(tmp_path: Path) -> None:
    tensors = pair(f"{ATTN}.to_q", 64, 64, rank=2, alpha=1.0) | pair(f"{ATTN}.to_k", 64, 64, rank=8, alpha=4.0)
    tensors |= pair(f"{ATTN}.to_v", 64, 64, rank=8, alpha=None)
    assert scale_of(tmp_path, tensors) == {"to_q": 0.5, "to_k": 0.5, "to_v": 1.0}


def test_alphas_of_the_metadata_of_diffusers(tmp_path: Path) -> None:
    tensors = {}
    for rank, layer in ((2, "to_q"), (4, "to_k"), (4, "add_q_proj")):
        tensors |= pair(f"{ATTN}.{layer}", 64, 64, rank=rank, alpha=None)
    given = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_k": 2, "transformer_blocks.0.attn.to_q": 3}}
    assert scale_of(tmp_path, tensors, given) == {"to_q": 1.5, "to_k": 0.5, "add_q_proj": 2.0}
    # Rank-stabilised LoRA divides by the root of the rank.
    assert scale_of(tmp_path, tensors, given | {"transformer.use_rslora": True})["add_q_proj"] == 4.0


def test_alphas_of_the_config_of_peft(tmp_path: Path) -> None:
    """PEFT's weights hold no alpha: its adapter_config.json lies next to them."""
    tensors = {
        name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): torch.ones_like(tensor)
        for name, tensor in pair(f"{PEFT}.to_q", 64, 64, alpha=None).items()
    }
    path, names = tmp_path / "adapter_model.safetensors", names_of(KINDS["flux"]())
    save_file(tensors, path)
    assert read(path, names).assumed == 1
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read(path, names)
    up = lora.changes[0].up
    assert up is not None and float(up.mean()) == 4.0 and lora.assumed == 0
    for changes, message in (
        ({"peft_type": "LOHA"}, r"adapter_config.json: peft_type: found 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, r"use_dora: found true, but .* has no magnitude"),
        ({"lora_alpha": "8"}, r"alpha of .*: found '8', expected a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern: found '\(a\+\)\+\$', expected the name of a layer"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            read(path, names)


@pytest.mark.parametrize("text", ["[]", "nonsense"])
def test_damaged_metadata(tmp_path: Path, text: str) -> None:
    save_file(pair(PROJ, 64, 64), tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(InputError, match=r"lora.safetensors: lora_adapter_metadata: "):
        read(tmp_path / "lora.safetensors", names_of(KINDS["flux"]()))
