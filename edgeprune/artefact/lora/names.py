"""Find the layer that a LoRA file means, whichever trainer named it.

Names differ in their prefix, in dots or underscores, and in whose code they follow: diffusers' or the model's original
code, which fuses layers that diffusers keeps apart. `Names` looks a name up among all that the model has, so it works
for models of any size.

diffusers converts such files too, but cannot account for them: it drops DoRA's magnitudes, differences of norms and
biases, T5, and alphas outside blocks without an error, knows one size of FLUX.1, and has no conversion for SD3. The
tables below follow its conversions of whole checkpoints (`single_file_utils.py`); a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgeprune.families import Config, Family, Shape
from edgeprune.families.encoders import T5

TRANSFORMER = "transformer"
"""The part of a pipeline that `Target.part` names, if it is no text encoder."""

_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_FUSED = {"attn.to_qkv": _QKV, "attn.to_added_qkv": _ADDED_QKV}
"""Layers that diffusers' `fuse_qkv_projections` makes."""
_DOUBLE = {
    "img_attn.qkv": _QKV, "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.qkv": _ADDED_QKV, "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
_SINGLE = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_REFINED = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v", "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q", "attention.k_norm": "attention.norm_k",
}  # fmt: skip
"""Of a block of Z-Image."""
_ENDS = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip

_OUTSIDE: dict[str, dict[str, str]] = {
    "flux": _ENDS | {
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    },
    "flux2": _ENDS | {
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    "sd3": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    "qwen-image": {},
    "z-image": {
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
}  # fmt: skip
"""Layers outside blocks: diffusers' name by the original code's, by family."""

_BLOCKS: dict[str, dict[tuple[str, str], dict[str, str]]] = {
    "flux": {
        ("double_blocks", "transformer_blocks"): _DOUBLE | {
            "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
            # XLabs' attention processors
            "processor.qkv_lora1": _QKV, "processor.proj_lora1": "attn.to_out.0",
            "processor.qkv_lora2": _ADDED_QKV, "processor.proj_lora2": "attn.to_add_out",
        },
        ("single_blocks", "single_transformer_blocks"): _SINGLE | {
            "linear1": f"{_QKV} proj_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear",
            "processor.qkv_lora": _QKV, "processor.proj_lora": "proj_out",
        },
        ("transformer_blocks", "transformer_blocks"): _FUSED,
        ("single_transformer_blocks", "single_transformer_blocks"): _FUSED,
    },
    "flux2": {
        ("double_blocks", "transformer_blocks"): _DOUBLE | {
            "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
        },
        ("single_blocks", "single_transformer_blocks"): _SINGLE | {
            "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out",
        },
        ("transformer_blocks", "transformer_blocks"): _FUSED,
    },
    "qwen-image": {("transformer_blocks", "transformer_blocks"): _FUSED},  # its authors' names are diffusers'
    "z-image": {(name, name): _REFINED for name in ("layers", "noise_refiner", "context_refiner")},
    "sd3": {
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.qkv": _QKV, "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.qkv": _ADDED_QKV, "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
            "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
        },
        ("transformer_blocks", "transformer_blocks"): _FUSED,
    },
}  # fmt: skip
"""Layers of blocks, by family and by the names of the two lists of blocks. Several names: fused, in this order."""

_PREFIXES = (
    *("base_model.model.", "model.", "diffusion_model.", "transformer."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
"""In the order in which they may follow each other."""
_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoder(?:_(?P<diffusers>\d))?\.|lora_te(?P<kohya>\d?)_"
    r"|text_encoders\.(?P<comfy>clip_l|clip_g|t5xxl)\.transformer\.)"
)
_CLIP_ROOT = re.compile(r"^text_model[._]")
"""Older versions of transformers hold all of CLIP in a module of this name."""


@dataclass(frozen=True)
class Target:
    """A layer of the model, and where it lies in the layer that the file names."""

    part: str
    """TRANSFORMER, or the folder of a text encoder."""
    layer: str
    """Its module's name, as in the part's weights."""
    rows: tuple[tuple[int, int], ...] | None = None
    """The rows of the file's layer that belong to it, in its order; None for all."""


class Names:
    """Every layer of a pipeline, by every name that a file may have for it."""

    def __init__(self, family: Family, config: Config, encoders: Mapping[str, Mapping[str, Shape]]) -> None:
        """Collect the names.

        Args:
            family: the transformer's.
            config: the transformer's.
            encoders: the shapes of each text encoder's tensors by name, by the encoder's folder.
        """
        self.family = family
        self.shapes: dict[str, Mapping[str, Shape]] = {TRANSFORMER: family.tensor_shapes(config), **encoders}
        """By part: the shapes of its tensors by name."""
        self._known: dict[str, dict[str, tuple[Target, ...]]] = {
            part: {
                _flat(_CLIP_ROOT.sub("", layer) if part != TRANSFORMER else layer): (Target(part, layer),)
                for layer in _layers(shapes)
            }
            for part, shapes in self.shapes.items()
        }
        for name, layers in _originals(family, self.shapes[TRANSFORMER], family.block_count(config)):
            self._known[TRANSFORMER][_flat(name)] = self._split(layers)

    def find(self, name: str) -> tuple[str, tuple[Target, ...]]:
        """Return the part of the pipeline that a layer of a file belongs to, and the layers that it stands for.

        The part may be a text encoder that the pipeline lacks. No layers mean that the part has none of this name.
        """
        if match := _ENCODER.match(name):
            part, rest = self._encoder(match), _CLIP_ROOT.sub("", name[match.end() :])
        else:
            part, rest = TRANSFORMER, name
            for prefix in _PREFIXES:
                rest = rest.removeprefix(prefix)
        return part, self._known.get(part, {}).get(_flat(rest), ())

    def _encoder(self, match: re.Match[str]) -> str:
        """Return the text encoder that a prefix names."""
        names = [encoder.name for encoder in self.family.encoders]
        if comfy := match["comfy"]:
            t5 = [encoder.name for encoder in self.family.encoders if encoder.kind == T5]
            return {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}.get(comfy) or (t5 or ["text_encoder_3"])[0]
        if match["diffusers"] and match["diffusers"] != "1":
            return f"text_encoder_{match['diffusers']}"
        # kohya calls T5 the third encoder, also where there are two.
        number = int(match["kohya"] or 1)
        return names[min(max(number, 1), len(names)) - 1]

    def _split(self, layers: list[str]) -> tuple[Target, ...]:
        """Return the targets of an original layer that holds these layers one after the other."""
        targets, start = [], 0
        for layer in layers:
            rows, *columns = self.shapes[TRANSFORMER][f"{layer}.weight"]
            middle, end = start + rows // 2, start + rows
            # The original code's last modulations hold shift and scale, diffusers' scale and shift.
            last = layer == "norm_out.linear" or (layer.endswith(".norm1_context.linear") and [rows // 2] == columns)
            whole = ((start, end),) if len(layers) > 1 else None
            targets.append(Target(TRANSFORMER, layer, ((middle, end), (start, middle)) if last else whole))
            start = end
        return tuple(targets)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layers(shapes: Mapping[str, Shape]) -> list[str]:
    return [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]


def _originals(family: Family, shapes: Mapping[str, Shape], count: int) -> Iterator[tuple[str, list[str]]]:
    """Yield every name of the original code that the model has, and diffusers' layers for it, in order."""
    for name, layer in _OUTSIDE[family.name].items():
        if f"{layer}.weight" in shapes:
            yield name, [layer]
    for (theirs, ours), layers in _BLOCKS[family.name].items():
        for index in range(count):
            for name, targets in layers.items():
                found = [f"{ours}.{index}.{target}" for target in targets.split()]
                if all(f"{layer}.weight" in shapes for layer in found):
                    yield f"{theirs}.{index}.{name}", found
