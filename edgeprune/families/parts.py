"""The tensors of a pipeline's other networks, text encoders and VAE, from their configs alone. Torch-free.

With these tables a folder is checked by its file headers before anything is loaded: vendors' loaders fill a missing
tensor with random numbers. Names and shapes are those of the state dicts of transformers and diffusers, and defaults
are those of their configs. Names that differ between files of the same model are mapped by `tensor_of`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, MOST_BLOCKS, real_number, shown, whole_number
from edgeprune.families import vae_qwen_image
from edgeprune.families.architecture import Config, Shape
from edgeprune.families.encoders import CLIP, CLIP_POOLED, LANGUAGE, QWEN2_5_VL, QWEN3, T5
from edgeprune.families.joint import linear

VAE, VAE_FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
"""Classes in diffusers. The second one normalises its latents by the statistics of a batch norm."""
VAE_QWEN_IMAGE = "AutoencoderKLQwenImage"
"""One of videos, for which an image is one frame; it normalises its latents by numbers of its config."""
VAES = (VAE, VAE_FLUX2, VAE_QWEN_IMAGE)
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_LARGEST_VOCABULARY = 2**24
_QWEN2_5_VL: Config = {
    "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152_064, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""Defaults of transformers' Qwen2_5_VLTextConfig."""
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
# Tensors of the whole CLIP or T5 that a text encoder does not have; transformers leaves them out, too.
_UNUSED = {
    CLIP: re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale|vision_model\..*|visual_projection\..*"),
    T5: re.compile(r"decoder\..*|lm_head\..*"),
    QWEN3: re.compile(r"lm_head\..*"),
    QWEN2_5_VL: re.compile(r"lm_head\..*|(model\.)?visual\..*"),
    # The batch norm's counter is an integer, and changes nothing.
    VAE_FLUX2: re.compile(r"bn\.num_batches_tracked"),
}
_UNUSED[CLIP_POOLED] = re.compile(_UNUSED[CLIP].pattern + r"|text_projection\..*")
_TIED = "encoder.embed_tokens.weight"
"""T5's other name for its `shared.weight`; a file may have either or both."""
BY_ROW = "model.embed_tokens.weight"
"""Words of a Qwen: where they are not packed, only the rows of a prompt's words are read."""
_LANGUAGE_LAYER, _LAST_NORM = re.compile(r"model\.layers\.(\d+)\."), "model.norm.weight"
_VAE_ATTENTION = re.compile(r"(.*\.mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.16


def tensor_of(kind: str, name: str) -> str | None:
    """Return a tensor's name in `part_shapes` from its name in a file or a state dict; None if it is not needed.

    Args:
        kind: the class: a text encoder of encoders.py, or one of `VAES`.
        name: CLIP's tensors have a prefix `text_model.` in most files and versions of transformers, in some they have
            none; so has Qwen3 without its head `model.`; Qwen2.5-VL has `model.` or `model.language_model.`; old VAEs
            have other names of attention.
    """
    if kind in _UNUSED and _UNUSED[kind].fullmatch(name):
        return None
    if kind in (CLIP, CLIP_POOLED) and name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"text_model.{name}"
    if kind == QWEN3 and name.startswith(("layers.", "embed_tokens.", "norm.")):  # of a model without its head
        return f"model.{name}"
    if kind == QWEN2_5_VL:  # as transformers has written it since 4.52
        return name.replace("model.language_model.", "model.", 1)
    if kind == T5 and name == _TIED:
        return "shared.weight"
    if kind in VAES and (match := _VAE_ATTENTION.fullmatch(name)):
        return f"{match[1]}.{_VAE_NAMES[match[2]]}.{match[3]}"
    return name


def is_read(kind: str, name: str, states: Sequence[int]) -> bool:
    """Return whether a tensor of a text encoder's file is read.

    Args:
        kind: the encoder's class.
        name: of the tensor, in a file.
        states: of a language model, the hidden states that are read: what only later ones need is not.
    """
    known = tensor_of(kind, name)
    if known is None:
        return False
    layer = _LANGUAGE_LAYER.match(known)
    return not states or (known != _LAST_NORM and (layer is None or int(layer[1]) < max(states)))


def part_shapes(kind: str, config: Config, where: object) -> dict[str, Shape] | None:
    """Return the shape of every tensor of a network by name; None for a class that has no table here.

    Args:
        kind: the class: a text encoder of encoders.py, or one of `VAES`.
        config: the content of its config.json.
        where: that file, for messages.

    Raises:
        InputError: a field has the wrong type, is out of range, or asks for layers that no such network has.
    """
    tables = {
        CLIP: _clip, CLIP_POOLED: _clip, T5: _t5, QWEN3: _qwen3, QWEN2_5_VL: _qwen2_5_vl,
        VAE: _vae, VAE_FLUX2: _vae_flux2, VAE_QWEN_IMAGE: vae_qwen_image.shapes,
    }  # fmt: skip
    if kind not in tables:
        return None
    shapes = tables[kind](config, where)
    if kind == CLIP:
        width, projected = (_number(config, n, 512, where) for n in ("hidden_size", "projection_dim"))
        shapes["text_projection.weight"] = (projected, width)
    return shapes


def vae_widths(config: Mapping[str, Any], where: object = "vae/config.json") -> list[int]:
    """Return a VAE's width at each resolution, the highest first.

    Raises:
        InputError: its config says none.
    """
    if config.get("_class_name") == VAE_QWEN_IMAGE or "dim_mult" in config:
        return vae_qwen_image.level_widths(config, where)
    widths = config.get("block_out_channels")
    whole = isinstance(widths, list) and all(type(n) is int and 1 <= n <= LARGEST for n in widths)
    if not whole or not isinstance(widths, list) or not 1 <= len(widths) <= vae_qwen_image.MOST_LEVELS:
        raise InputError(f"{where}: block_out_channels: found {shown(widths)}, expected a list of widths")
    return widths


def vae_channels(kind: str, config: Mapping[str, Any], where: object) -> tuple[str, int]:
    """Return the channels of a VAE's latents, after the name of their field.

    Raises:
        InputError: the field is no whole number.
    """
    field, default = ("z_dim", 16) if kind == VAE_QWEN_IMAGE else ("latent_channels", 4 if kind == VAE else 32)
    return field, whole_number({field: default} | dict(config), field, where)


def text_outputs(kind: str, config: Config, where: object) -> tuple[int, int]:
    """Return the widths of a hidden state and of pooled text; T5 and Qwens have no pooled text, which is 0 wide.

    Raises:
        InputError: a field has the wrong type or is out of range.
    """
    if kind == T5:
        return _number(config, "d_model", 512, where), 0
    if kind in LANGUAGE:
        config = config if kind == QWEN3 else text_config(config)
        return _number(config, "hidden_size", 4096, where), 0
    width = _number(config, "hidden_size", 512, where)
    return width, _number(config, "projection_dim", 512, where) if kind == CLIP else width


def _number(config: Config, name: str, default: int, where: object, *, most: int = LARGEST) -> int:
    return whole_number({name: default} | config, name, where, most=most)


def _divisor(config: Config, name: str, default: int, of: dict[str, list[int]], where: object) -> None:
    """Check that a number divides others, which are given by the name of their field."""
    number = _number(config, name, default, where)
    for field, values in of.items():
        if any(value % number for value in values):
            raise InputError(f"{where}: {name}: found {number}, expected a divisor of {field}, {values}")


def _check_arithmetic(config: Config, epsilon: tuple[str, float], function: tuple[str, str], where: object) -> None:
    """Check what has no tensor: the epsilon of norms and the activation function, given with their defaults."""
    real_number(dict([epsilon]) | config, epsilon[0], where, least=1e-12, most=0.1)
    name, default = function
    if (found := config.get(name, default)) not in _ACTIVATIONS:
        raise InputError(f"{where}: {name}: found {shown(found)}, expected one of {', '.join(_ACTIVATIONS)}")


def _clip(config: Config, where: object) -> dict[str, Shape]:
    width, inner = _number(config, "hidden_size", 512, where), _number(config, "intermediate_size", 2048, where)
    _divisor(config, "num_attention_heads", 8, {"hidden_size": [width]}, where)
    _check_arithmetic(config, ("layer_norm_eps", 1e-5), ("hidden_act", "quick_gelu"), where)
    words = _number(config, "vocab_size", 49_408, where, most=_LARGEST_VOCABULARY)
    shapes: dict[str, Shape] = {
        "text_model.embeddings.token_embedding.weight": (words, width),
        "text_model.embeddings.position_embedding.weight": (
            _number(config, "max_position_embeddings", 77, where), width
        ),
    }  # fmt: skip
    for i in range(_number(config, "num_hidden_layers", 12, where, most=MOST_BLOCKS)):
        at = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{at}.self_attn.{name}", width, width)
        shapes |= linear(f"{at}.mlp.fc1", inner, width) | linear(f"{at}.mlp.fc2", width, inner)
        shapes |= _norm(f"{at}.layer_norm1", width) | _norm(f"{at}.layer_norm2", width)
    return shapes | _norm("text_model.final_layer_norm", width)


def _t5(config: Config, where: object) -> dict[str, Shape]:
    width, inner = _number(config, "d_model", 512, where), _number(config, "d_ff", 2048, where)
    heads = _number(config, "num_heads", 8, where)
    attention = heads * _number(config, "d_kv", 64, where)
    feed_forward = str(config.get("feed_forward_proj", "relu"))
    gated = feed_forward.startswith("gated-")
    function = {"feed_forward_proj": feed_forward.removeprefix("gated-")}
    _check_arithmetic(config | function, ("layer_norm_epsilon", 1e-6), ("feed_forward_proj", "relu"), where)
    _number(config, "relative_attention_max_distance", 128, where)
    words = _number(config, "vocab_size", 32_128, where, most=_LARGEST_VOCABULARY)
    shapes: dict[str, Shape] = {"shared.weight": (words, width)}
    for i in range(_number(config, "num_layers", 6, where, most=MOST_BLOCKS)):
        at = f"encoder.block.{i}.layer"
        shapes |= {f"{at}.0.SelfAttention.{n}.weight": (attention, width) for n in "qkv"}
        shapes[f"{at}.0.SelfAttention.o.weight"] = (width, attention)
        if i == 0:  # the other layers use the first one's
            buckets = _number(config, "relative_attention_num_buckets", 32, where)
            shapes[f"{at}.0.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            shapes[f"{at}.1.DenseReluDense.{name}.weight"] = (inner, width)
        shapes[f"{at}.1.DenseReluDense.wo.weight"] = (width, inner)
        shapes |= {f"{at}.{n}.layer_norm.weight": (width,) for n in (0, 1)}
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


def _qwen3(config: Config, where: object) -> dict[str, Shape]:
    width, inner = _number(config, "hidden_size", 4096, where), _number(config, "intermediate_size", 22_016, where)
    heads, head = _number(config, "num_attention_heads", 32, where), _number(config, "head_dim", 128, where)
    shared = _number(config, "num_key_value_heads", 32, where)
    _divisor(config, "num_key_value_heads", 32, {"num_attention_heads": [heads]}, where)
    _check_arithmetic(config, ("rms_norm_eps", 1e-6), ("hidden_act", "silu"), where)
    for name in ("attention_bias", "use_sliding_window"):
        if (found := config.get(name, False)) is not False:
            raise InputError(f"{where}: {name}: found {shown(found)}, expected false, as in Qwen3's published models")
    layers = _number(config, "num_hidden_layers", 32, where, most=MOST_BLOCKS)
    if (kinds := config.get("layer_types")) not in (None, ["full_attention"] * layers):
        raise InputError(f"{where}: layer_types: found {shown(kinds)}, expected {layers} times 'full_attention'")
    _check_rope(config, head, where)
    words = _number(config, "vocab_size", 151_936, where, most=_LARGEST_VOCABULARY)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, rows in (("q", heads), ("k", shared), ("v", shared)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows * head, width)
        shapes[f"{at}.self_attn.o_proj.weight"] = (width, heads * head)
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


def text_config(config: Config) -> Config:
    """Return what a config of Qwen2.5-VL says of text: newer ones have it in a part of its own."""
    found = config.get("text_config")
    return {**_QWEN2_5_VL, **config, **(found if isinstance(found, dict) else {})}


def _qwen2_5_vl(config: Config, where: object) -> dict[str, Shape]:
    config = text_config(config)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    width, heads, shared, layers = (whole_number(config, name, where) for name in names)
    _divisor(config, "num_attention_heads", 1, {"hidden_size": [width]}, where)
    # Sections of rows and columns, which text does not have.
    plain: Config = {"rope_scaling": None, "rope_parameters": None}
    for field in plain:
        found = config.get(field) or {}
        kind = found.get("rope_type", found.get("type", "default")) if isinstance(found, dict) else found
        if kind not in ("default", "mrope"):
            raise InputError(f"{where}: {field}: found {shown(found)}, expected the type 'mrope' or 'default'")
        plain[field] = {n: v for n, v in found.items() if n == "rope_theta"} or None
    shapes = _qwen3(config | plain | {"head_dim": width // heads}, where)
    shapes = {name: shape for name, shape in shapes.items() if not re.search(r"self_attn\.[qk]_norm", name)}
    for i in range(layers):  # not more than `_qwen3` has let pass
        at = f"model.layers.{i}.self_attn"
        for name, rows in (("q", heads), ("k", shared), ("v", shared)):
            shapes[f"{at}.{name}_proj.bias"] = (rows * (width // heads),)
    return shapes


def _check_rope(config: Config, head: int, where: object) -> None:
    """Check that a language model's rotary positions are the plain ones, by both versions of transformers' fields.

    Args:
        config: the content of its config.json.
        head: width of a head, of which pairs of channels turn.
        where: that file, for messages.
    """
    if head % 2:
        raise InputError(f"{where}: head_dim: found {head}, expected an even number")
    for field in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        found = config.get(field) or {}
        if not isinstance(found, dict):
            raise InputError(f"{where}: {field}: found {shown(found)}, expected none or an object")
        if (kind := found.get("rope_type", found.get("type", "default"))) != "default":
            raise InputError(f"{where}: {field}: rope_type: found {shown(kind)}, expected 'default'")
        real_number({"rope_theta": 1.0} | found, "rope_theta", f"{where}: {field}", least=1, most=1e12)
    real_number({"rope_theta": 1.0} | config, "rope_theta", where, least=1, most=1e12)


def _vae_flux2(config: Config, where: object) -> dict[str, Shape]:
    defaults = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 32}
    config = defaults | config
    if (patch := config.get("patch_size", [2, 2])) not in ([2, 2], (2, 2)):
        raise InputError(f"{where}: patch_size: found {shown(patch)}, expected [2, 2]")
    real_number({"batch_norm_eps": 1e-4} | config, "batch_norm_eps", where, least=1e-12, most=0.1)
    shapes = _autoencoder(config | {"sample_size": 32}, where, VAE_FLUX2)  # its own may be a pair; it changes nothing
    channels = 4 * _number(config, "latent_channels", 32, where)
    return shapes | {"bn.running_mean": (channels,), "bn.running_var": (channels,)}


def _vae(config: Config, where: object) -> dict[str, Shape]:
    return _autoencoder(config, where, VAE)


def _widths(config: Config, field: str, where: object) -> list[int]:
    widths = config.get(field, [64])
    if not isinstance(widths, list) or not all(type(w) is int and 1 <= w <= LARGEST for w in widths) or not widths:
        raise InputError(f"{where}: {field}: found {shown(widths)}, expected a list of widths")
    return widths


def _autoencoder(config: Config, where: object, kind: str) -> dict[str, Shape]:
    widths = _widths(config, "block_out_channels", where)
    narrow = kind == VAE_FLUX2 and bool(config.get("decoder_block_out_channels"))
    decoder = _widths(config, "decoder_block_out_channels", where) if narrow else widths
    if (found := config.get("_class_name", kind)) != kind:
        raise InputError(f"{where}: _class_name: found {shown(found)}, expected {kind!r}")
    for field, block in _BLOCKS.items():
        default = [block] * (4 if kind == VAE_FLUX2 else 1)
        if (blocks := config.get(field, default)) != [block] * len(widths):
            raise InputError(f"{where}: {field}: found {shown(blocks)}, expected {len(widths)} times {block}")
    if len(decoder) != len(widths):
        raise InputError(f"{where}: decoder_block_out_channels: found {decoder}, expected {len(widths)} widths")
    grouped = {"block_out_channels": widths} | ({"decoder_block_out_channels": decoder} if narrow else {})
    _divisor(config, "norm_num_groups", 32, grouped, where)
    _check_arithmetic(config, ("norm_eps", 1e-6), ("act_fn", "silu"), where)
    _number(config, "sample_size", 32, where)
    layers = _number(config, "layers_per_block", 1, where, most=MOST_BLOCKS)
    latent = _number(config, "latent_channels", 4, where)
    attention = config.get("mid_block_add_attention", True)
    colours = {n: _number(config, n, 3, where) for n in ("in_channels", "out_channels")}
    shapes = _conv("encoder.conv_in", widths[0], colours["in_channels"])
    shapes |= _levels("encoder.down_blocks", [widths[0], *widths], layers, "downsamplers")
    shapes |= _middle("encoder", widths[-1], attention) | _norm("encoder.conv_norm_out", widths[-1])
    shapes |= _conv("encoder.conv_out", 2 * latent, widths[-1]) | _conv("decoder.conv_in", decoder[-1], latent)
    shapes |= _levels("decoder.up_blocks", [decoder[-1], *reversed(decoder)], layers + 1, "upsamplers")
    shapes |= _middle("decoder", decoder[-1], attention) | _norm("decoder.conv_norm_out", decoder[0])
    shapes |= _conv("decoder.conv_out", colours["out_channels"], decoder[0])
    if config.get("use_quant_conv", True):
        shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        shapes |= _conv("post_quant_conv", latent, latent, 1)
    return shapes


def _levels(name: str, widths: list[int], layers: int, resampler: str) -> dict[str, Shape]:
    """Return a VAE's blocks of one resolution each; `widths` are those before the first and after each block."""
    shapes: dict[str, Shape] = {}
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        for layer in range(layers):
            shapes |= _residual(f"{name}.{i}.resnets.{layer}", after, after if layer else before)
        if i < len(widths) - 2:
            shapes |= _conv(f"{name}.{i}.{resampler}.0.conv", after, after)
    return shapes


def _middle(name: str, width: int, attention: Any) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for i in (0, 1):
        shapes |= _residual(f"{name}.mid_block.resnets.{i}", width, width)
    if attention:
        at = f"{name}.mid_block.attentions.0"
        shapes |= _norm(f"{at}.group_norm", width)
        for layer in _VAE_NAMES.values():
            shapes |= linear(f"{at}.{layer}", width, width)
    return shapes


def _residual(name: str, after: int, before: int) -> dict[str, Shape]:
    shapes = _norm(f"{name}.norm1", before) | _conv(f"{name}.conv1", after, before)
    shapes |= _norm(f"{name}.norm2", after) | _conv(f"{name}.conv2", after, after)
    return shapes | (_conv(f"{name}.conv_shortcut", after, before, 1) if after != before else {})


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, after: int, before: int, side: int = 3) -> dict[str, Shape]:
    return {f"{name}.weight": (after, before, side, side), f"{name}.bias": (after,)}
