"""Which model the tensors of a file are, from their names and shapes, and from the file's name where these are equal.

A file can hold a transformer alone, or a whole pipeline: each part has a prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprune.families import Config, Shape
from edgeprune.families.encoders import QWEN3, T5

LORA = "a LoRA"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "")
"""Of a transformer's tensors, the longest first."""
ENCODERS = ("text_encoders.", "cond_stage_model.")
VAES = ("vae.", "first_stage_model.")
LONG_PARTS = {"t5xxl": T5, "qwen3_4b": QWEN3}
"""Classes of text encoders that are no CLIPs, by their names in a file."""

_NETWORKS = (
    ("SD3Transformer2DModel", r"joint_blocks\.0\.x_block\."),
    ("SD3Transformer2DModel", r"pos_embed\.proj\.weight"),
    ("FluxTransformer2DModel", r"double_blocks\.0\.img_attn\.qkv\."),
    ("FluxTransformer2DModel", r"single_transformer_blocks\.0\.proj_mlp\."),
    ("ZImageTransformer2DModel", r"layers\.0\.adaLN_modulation\.0\."),
)
"""What tells each transformer, in the layout of its authors and in diffusers', without the prefix."""
_FOREIGN = (
    (r"lora_(A|B|down|up|magnitude)|\.lora\.(down|up)|hada_w|lokr_|dora_scale|_lora\d?\.(down|up)", LORA),
    (
        r"control_(model|layers|all_x_embedder)\.|controlnet_|control_add_embedding|input_hint_block|pos_embed_input\.proj",
        "a ControlNet",
    ),
    (r"ip_adapter|image_proj\.|redux_(up|down)|pulid_", "an image adapter"),
    (r"distilled_guidance_layer\.", "Chroma"),
    (r"double_stream_modulation_img\.", "FLUX.2"),
    (r"individual_token_refiner|img_attn_qkv", "HunyuanVideo"),
    (r"double_stream_blocks\.0\.", "HiDream"),
    (r"(double_layers|joint_transformer_blocks)\.0\.", "AuraFlow"),
    (r"transformer_blocks\.0\.img_mod\.1\.", "Qwen-Image"),
    (r"layers\.0\.adaLN_modulation\.1\.", "Lumina"),
    (r"siglip_embedder\.", "Z-Image-Omni"),
    (r"(^|\.)blocks\.0\.(cross_attn|self_attn|attn1|attn2)\.", "a DiT that is no MMDiT, such as Wan"),
    (r"adaln_single\.|scale_shift_table", "PixArt, Sana or LTX-Video"),
    (r"label_emb\.0\.0|conditioner\.embedders\.1\.|add_embedding\.linear_1", "Stable Diffusion XL"),
    (
        r"(^|model\.diffusion_model\.)(input_blocks|output_blocks|middle_block)\.|down_blocks\.0\.attentions\.",
        "Stable Diffusion 1 or 2",
    ),
)
"""What is never converted: a part of a name, and what it tells. The first that fits counts."""
_PARTS = (
    (r"(^|\.)decoder\.(up|up_blocks|mid|mid_block)\.", "a VAE"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.|enc\.blk\.0\.", "a T5 text encoder"),
    (r"text_model\.encoder\.layers\.0\.|resblocks\.0\.attn\.", "a CLIP text encoder"),
    (r"(model\.|^)layers\.0\.(self_attn|mlp)\.|(^|\.)blk\.0\.(attn|ffn)_", "a language model"),
)
"""Likewise, of files without a transformer."""
FAMILY_NAMES = {
    "SD3Transformer2DModel": "Stable Diffusion 3", "FluxTransformer2DModel": "FLUX.1",
    "ZImageTransformer2DModel": "Z-Image",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A published model: what is known of its transformer, and where the rest of it is."""

    name: str
    hub: str
    facts: Config
    """Fields of its config that shapes tell."""
    word: str = ""
    """A word in the file's name that tells it from a model with the same shapes."""


_LARGE = {"num_layers": 38, "width": 2432, "pos_embed_max_size": 192, "qk_norm": True, "dual": 0}
_FLUX = {"num_layers": 19, "num_single_layers": 38, "width": 3072, "in_channels": 64}
_Z_IMAGE = {"n_layers": 30, "n_refiner_layers": 2, "width": 3840, "in_channels": 16}
MODELS = {
    "SD3Transformer2DModel": (
        Model("Stable Diffusion 3.5 Large Turbo", "stabilityai/stable-diffusion-3.5-large-turbo", _LARGE, "turbo"),
        Model("Stable Diffusion 3.5 Large", "stabilityai/stable-diffusion-3.5-large", _LARGE),
        Model(
            "Stable Diffusion 3.5 Medium", "stabilityai/stable-diffusion-3.5-medium",
            {"num_layers": 24, "width": 1536, "pos_embed_max_size": 384, "qk_norm": True, "dual": 13},
        ),
        Model(
            "Stable Diffusion 3 Medium", "stabilityai/stable-diffusion-3-medium-diffusers",
            {"num_layers": 24, "width": 1536, "pos_embed_max_size": 192, "qk_norm": False, "dual": 0},
        ),
    ),
    "FluxTransformer2DModel": (
        Model("FLUX.1 dev", "black-forest-labs/FLUX.1-dev", _FLUX | {"guidance_embeds": True}),
        Model("FLUX.1 schnell", "black-forest-labs/FLUX.1-schnell", _FLUX | {"guidance_embeds": False}),
    ),
    "ZImageTransformer2DModel": (
        Model("Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", _Z_IMAGE, "turbo"),
        Model("Z-Image", "Tongyi-MAI/Z-Image", _Z_IMAGE),
    ),
}  # fmt: skip
"""By class in diffusers."""


@dataclass(frozen=True)
class Identity:
    """What a file holds."""

    network: str
    """The transformer's class in diffusers."""
    prefix: str
    """Of the transformer's tensors."""
    facts: Config
    """What shapes tell of the transformer's config: see `facts_of`."""
    parts: dict[str, str] = field(default_factory=dict)
    """The prefix of each other part: clip_l, clip_g, t5xxl, qwen3_4b, vae."""
    model: Model | None = None
    """The published model of this size; None for a size that is none of theirs."""
    guess: str = ""
    """What was concluded from more than shapes, in a line."""

    @property
    def name(self) -> str:
        """The model in words."""
        if self.model:
            return self.model.name
        counts = [str(self.facts[n]) for n in ("num_layers", "num_single_layers", "n_layers") if n in self.facts]
        return f"{FAMILY_NAMES[self.network]} of {'+'.join(counts)} blocks, {self.facts.get('width')} wide"


def identify(shapes: Mapping[str, Shape], hints: str) -> Identity | str:
    """Return what the tensors are; without a transformer that can be converted, in words.

    Args:
        shapes: of all weights, by name.
        hints: names of the file, and its own description.
    """
    if foreign := _first(_FOREIGN, shapes):
        return foreign
    prefixes = "|".join(map(re.escape, PREFIXES))
    for network, pattern in _NETWORKS:
        if match := next(filter(None, (re.match(rf"({prefixes}){pattern}", name) for name in shapes)), None):
            return _identity(network, match[1], shapes, hints)
    return _first(_PARTS, shapes) or "tensors of an unknown model"


def _first(table: Iterable[tuple[str, str]], names: Iterable[str]) -> str:
    names = list(names)
    return next((what for pattern, what in table if any(re.search(pattern, name) for name in names)), "")


def _identity(network: str, prefix: str, shapes: Mapping[str, Shape], hints: str) -> Identity:
    parts: dict[str, str] = {}
    for name in shapes:
        for start in ENCODERS:
            if match := re.match(rf"{re.escape(start)}(clip_l|clip_g|t5xxl|qwen3_4b)\.", name):
                parts.setdefault(match[1], f"{start}{match[1]}.")
        for start in VAES:
            if name.startswith(start):
                parts.setdefault("vae", start)
    own = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix) and not part_of(n, parts)}
    facts = facts_of(network, own)
    fits = [model for model in MODELS[network] if all(facts.get(k) == v for k, v in model.facts.items())]
    named = [model for model in fits if model.word and model.word in hints.lower()]
    model = next(iter(named or [model for model in fits if not model.word]), None)
    guess = ""
    if model and len(fits) > 1:
        others = ", ".join(m.name for m in fits if m is not model)
        reason = f"its name has {model.word!r} in it" if named else "its name does not say otherwise"
        guess = f"taken for {model.name}, not {others}, which has the same shapes: {reason}"
    elif model and network == "FluxTransformer2DModel":
        said = "has" if facts["guidance_embeds"] else "has no"
        guess = f"taken for {model.name}: the transformer {said} guidance embedding"
    return Identity(network, prefix, facts, parts, model, guess)


def part_of(name: str, parts: Mapping[str, str]) -> str:
    """Return the part besides the transformer that a tensor belongs to; '' for the transformer's."""
    return next((part for part, prefix in parts.items() if name.startswith(prefix)), "")


def facts_of(network: str, shapes: Mapping[str, Shape]) -> Config:
    """Return what the shapes of a transformer tell of its config, in any layout.

    `width` and `dual` (the number of blocks with a second attention) are not fields of a config.
    """

    def count(pattern: str) -> int:
        found = [int(match[1]) for name in shapes if (match := re.match(rf"{pattern}\.(\d{{1,4}})\.", name))]
        return max(found, default=-1) + 1

    def sides(*names: str) -> Shape:
        return next((shapes[name] for name in names if name in shapes), ())

    facts: dict[str, Any] = {}
    if network == "FluxTransformer2DModel":
        facts["num_layers"] = count(r"(?:double_blocks|transformer_blocks)")
        facts["num_single_layers"] = count(r"(?:single_blocks|single_transformer_blocks)")
        facts["guidance_embeds"] = any("guidance_in." in n or ".guidance_embedder." in n for n in shapes)
        entry = sides("img_in.weight", "x_embedder.weight")
        if len(entry) == 2:
            facts["width"], facts["in_channels"] = entry
        return facts
    if network == "ZImageTransformer2DModel":
        facts["n_layers"], facts["n_refiner_layers"] = count("layers"), count("noise_refiner")
        entry = sides("x_embedder.weight", "all_x_embedder.2-1.weight")
        if len(entry) == 2:
            facts["width"], facts["in_channels"] = entry[0], entry[1] // 4
        return facts
    facts["num_layers"] = count(r"(?:joint_blocks|transformer_blocks)")
    entry, table = sides("x_embedder.proj.weight", "pos_embed.proj.weight"), sides("pos_embed", "pos_embed.pos_embed")
    if len(entry) == 4:
        facts["width"], facts["in_channels"], facts["patch_size"] = entry[:3]
    if facts.get("width") and table:
        facts["pos_embed_max_size"] = math.isqrt(math.prod(table) // facts["width"])
    facts["qk_norm"] = any(".ln_q." in n or ".norm_q." in n for n in shapes)
    facts["dual"] = len({n.split(".")[1] for n in shapes if ".attn2." in n})
    return facts


def refused(identity: Identity, hints: str) -> str:
    """Return which model it is, if it is one that takes more than a prompt; else ''."""
    channels = identity.facts.get("in_channels")
    if identity.network == "FluxTransformer2DModel":
        kinds = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny", 96: "FLUX.1 with a control image"}
        if channels in kinds and identity.facts.get("width") == 3072:
            return kinds[channels]
        if "kontext" in hints.lower():
            return "FLUX.1 Kontext, by its name"
    return ""
