"""Single files as other programs write them, made from tiny diffusers pipelines: the inverse of what convert does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_ENDS = {
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", "t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", "t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "y_embedder.mlp.2"),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", ""),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", ""),
    "x_embedder": ("img_in", ""), "pos_embed.proj": ("", "x_embedder.proj"),
    "context_embedder": ("txt_in", "context_embedder"),
    "proj_out": ("final_layer.linear", "final_layer.linear"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
}  # fmt: skip
_JOINT = {
    "norm1.linear": ("img_mod.lin", "x_block.adaLN_modulation.1"),
    "norm1_context.linear": ("txt_mod.lin", "context_block.adaLN_modulation.1"),
    "attn.to_out.0": ("img_attn.proj", "x_block.attn.proj"),
    "attn.to_add_out": ("txt_attn.proj", "context_block.attn.proj"),
    "attn2.to_out.0": ("", "x_block.attn2.proj"),
    "attn.norm_q": ("img_attn.norm.query_norm", "x_block.attn.ln_q"),
    "attn.norm_k": ("img_attn.norm.key_norm", "x_block.attn.ln_k"),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", "context_block.attn.ln_q"),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", "context_block.attn.ln_k"),
    "attn2.norm_q": ("", "x_block.attn2.ln_q"), "attn2.norm_k": ("", "x_block.attn2.ln_k"),
    "ff.net.0.proj": ("img_mlp.0", "x_block.mlp.fc1"), "ff.net.2": ("img_mlp.2", "x_block.mlp.fc2"),
    "ff_context.net.0.proj": ("txt_mlp.0", "context_block.mlp.fc1"),
    "ff_context.net.2": ("txt_mlp.2", "context_block.mlp.fc2"),
}  # fmt: skip
_SINGLE = {
    "norm.linear": "modulation.lin", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}  # fmt: skip
_FUSED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): ("img_attn.qkv", "x_block.attn.qkv"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): ("txt_attn.qkv", "context_block.attn.qkv"),
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): ("", "x_block.attn2.qkv"),
}


def original(state: Mapping[str, torch.Tensor], *, sd3: bool) -> Tensors:
    """Return a transformer's state dict in the layout of its authors: SD3's (SAI) or FLUX.1's (BFL)."""
    out: Tensors = {}
    left = dict(state)

    def put(name: str, layer: str, *, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{layer}.{kind}" in left:
                tensor = left.pop(f"{layer}.{kind}")
                named = "scale" if not sd3 and "_norm" in name else kind
                out[f"{name}.{named}"] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor

    for layer, names in _ENDS.items():
        put(names[sd3], layer, swap=layer == "norm_out.linear")
    if "pos_embed.pos_embed" in left:
        out["pos_embed"] = left.pop("pos_embed.pos_embed")
    for prefix in sorted({m[0] for n in left if (m := re.match(r"(single_)?transformer_blocks\.\d+\.", n))}):
        theirs = prefix.replace("single_transformer_blocks", "single_blocks")
        theirs = theirs.replace("transformer_blocks", "joint_blocks" if sd3 else "double_blocks")
        if prefix.startswith("single"):
            fused = {("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1"}
            layers: dict[str, str] = _SINGLE
        else:
            fused = {parts: names[sd3] for parts, names in _FUSED.items()}
            layers = {layer: names[sd3] for layer, names in _JOINT.items()}
        for parts, name in fused.items():
            for kind in ("weight", "bias"):
                tensors = [left.pop(f"{prefix}{p}.{kind}") for p in parts if f"{prefix}{p}.{kind}" in left]
                if tensors:
                    out[f"{theirs}{name}.{kind}"] = torch.cat(tensors)
        for layer, name in layers.items():
            bias = left.get(f"{prefix}{layer}.bias")
            last = layer == "norm1_context.linear" and bias is not None and len(bias) == 2 * out_width(state)
            put(f"{theirs}{name}", f"{prefix}{layer}", swap=last)
    assert not left, sorted(left)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def z_image(state: Mapping[str, torch.Tensor]) -> Tensors:
    """Return a Z-Image's state dict in the layout of its authors, with a norm that nothing reads."""
    out: Tensors = {"norm_final.weight": torch.ones_like(state["x_pad_token"][0])}
    for name, tensor in state.items():
        layer, _, rest = name.partition("attention.to_")
        if rest == "q.weight":
            parts = [state[f"{layer}attention.to_{part}.weight"] for part in "qkv"]
            out[f"{layer}attention.qkv.weight"] = torch.cat(parts)
        elif rest not in ("k.weight", "v.weight"):
            new = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", name)
            new = new.replace("attention.to_out.0", "attention.out")
            out[re.sub(r"attention\.norm_([qk])", r"attention.\1_norm", new)] = tensor
    return out


def out_width(state: Mapping[str, torch.Tensor]) -> int:
    return len(state["time_text_embed.timestep_embedder.linear_2.bias"])


def ldm_vae(state: Mapping[str, torch.Tensor]) -> Tensors:
    """Return a VAE's state dict in the layout of latent diffusion."""
    levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("decoder.up_blocks."))
    out = {}
    for name, tensor in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions" in new:
            layers = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            for ours, theirs in layers.items():
                new = new.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = tensor
    return out


def all_in_one(folder: Path, *, prefix: str = "model.diffusion_model.") -> Tensors:
    """Return a whole pipeline's tensors as ComfyUI saves a checkpoint."""
    index = json.loads((folder / "model_index.json").read_text())
    sd3 = index["_class_name"] == "StableDiffusion3Pipeline"
    out = {f"{prefix}{n}": t for n, t in original(weights(folder / "transformer"), sd3=sd3).items()}
    out |= {f"first_stage_model.{n}": t for n, t in ldm_vae(weights(folder / "vae")).items()}
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g" if sd3 else "t5xxl", "text_encoder_3": "t5xxl"}
    for name, short in encoders.items():
        if (index.get(name) or [None])[0]:
            out |= {f"text_encoders.{short}.transformer.{n}": t for n, t in weights(folder / name).items()}
            out[f"text_encoders.{short}.logit_scale"] = torch.tensor(4.6)
    return out


def weights(folder: Path) -> Tensors:
    """Return all tensors of a part's folder."""
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def save(tensors: Mapping[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt", **metadata})
    return path


def scaled_fp8(tensors: Mapping[str, torch.Tensor], *, new: bool = False, rows: bool = False) -> Tensors:
    """Return the weights of layers in float8 with scales, as ComfyUI's files have them, under old or new names."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            out[name] = tensor
            continue
        layer, most = name.removesuffix(".weight"), tensor.float().abs()
        scale = (most.amax(1) if rows else most.max()).clamp(min=1e-6) / 448
        out[name] = (tensor.float() / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
        out[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale
        out[f"{layer}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(0.5)
        if new:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            out[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    if not new:
        out["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return out


def unscaled(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return what `scaled_fp8` stands for, in bfloat16."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            scale = next(tensors[k] for k in (f"{layer}.scale_weight", f"{layer}.weight_scale") if k in tensors)
            out[name] = (tensor.float() * scale.reshape(-1, 1)).to(torch.bfloat16)
        elif not name.endswith(("scale_weight", "weight_scale", "scale_input", "input_scale", "_fp8", "comfy_quant")):
            out[name] = tensor
    return out


def write_gguf(
    tensors: Mapping[str, torch.Tensor], path: Path, kinds: Mapping[str, str] | str, *, architecture: str = "flux"
) -> dict[str, Any]:
    """Write a GGUF file as ComfyUI-GGUF does; return each tensor as the package `gguf` reads it again, in float32.

    Args:
        tensors: by name.
        path: the file.
        kinds: the type of each tensor of two axes or more, or one for all of them; the others are F32.
        architecture: what the file says it is.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    expected = {}
    for name, tensor in tensors.items():
        kind = (kinds if isinstance(kinds, str) else kinds.get(name, "F32")) if tensor.ndim > 1 else "F32"
        number = gguf.GGMLQuantizationType[kind]
        data = tensor.float().numpy()
        block, size = gguf.GGML_QUANT_SIZES[number]
        if data.shape[-1] % block:
            if data.size % block:
                number, kind = gguf.GGMLQuantizationType.F16, "F16"
            else:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(side) for side in data.shape])
                data = data.reshape(-1, block)
        try:
            raw = gguf.quantize(data, number)
        except NotImplementedError:  # the package reads K-quants, and does not write them
            rng = np.random.default_rng(len(name))
            raw = rng.integers(0, 120, (*data.shape[:-1], data.shape[-1] // block * size), dtype=np.uint8)
        expected[name] = torch.from_numpy(gguf.dequantize(raw, number).astype(np.float32)).reshape(tensor.shape)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
