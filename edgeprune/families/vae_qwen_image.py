"""The tensors of `AutoencoderKLQwenImage`, a VAE of videos, from its config alone. Torch-free.

Names and shapes are those of diffusers' state dict; its convolutions have three axes, the first of which is time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, MOST_BLOCKS, shown, whole_number
from edgeprune.families.architecture import Config, Shape

_DEFAULTS: Config = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "input_channels": 3,
}  # fmt: skip
_CUBE, _POINT, _FRAMES = (3, 3, 3), (1, 1, 1), (3, 1, 1)
MOST_LEVELS = 8
"""Resolutions of a VAE, each half of the one before; today's VAEs have four."""


def level_widths(config: Mapping[str, Any], where: object) -> list[int]:
    """Return the width of each resolution, the highest first.

    Raises:
        InputError: a field is out of range.
    """
    config = _DEFAULTS | dict(config)
    base, factors = whole_number(config, "base_dim", where), config["dim_mult"]
    whole = isinstance(factors, list) and all(type(n) is int and n >= 1 and n * base <= LARGEST for n in factors)
    if not whole or not 1 <= len(factors) <= MOST_LEVELS:
        raise InputError(f"{where}: dim_mult: found {shown(factors)}, expected a list of factors of base_dim")
    return [base * factor for factor in factors]


def shapes(config: Config, where: object) -> dict[str, Shape]:
    """Return the shape of every tensor.

    Args:
        config: the content of its config.json.
        where: that file, for messages.

    Raises:
        InputError: a field has the wrong type or is out of range, or there is attention outside the middle.
    """
    config = _DEFAULTS | config
    widths, latent = level_widths(config, where), whole_number(config, "z_dim", where)
    layers, colours = whole_number(config, "num_res_blocks", where, most=MOST_BLOCKS), config["input_channels"]
    in_time = config["temperal_downsample"]
    if not isinstance(in_time, list) or [type(one) for one in in_time] != [bool] * (len(widths) - 1):
        expected = f"{len(widths) - 1} times true or false"
        raise InputError(f"{where}: temperal_downsample: found {shown(in_time)}, expected {expected}")
    if (found := config["attn_scales"]) != []:
        raise InputError(f"{where}: attn_scales: found {shown(found)}, expected [], as in the published model")
    if colours != 3:
        raise InputError(f"{where}: input_channels: found {shown(colours)}, expected 3: red, green and blue")
    return {
        **_encoder([widths[0], *widths], layers, latent, in_time),
        **_decoder([widths[-1], *reversed(widths)], layers + 1, latent, in_time[::-1]),
        **_conv("quant_conv", 2 * latent, 2 * latent, _POINT), **_conv("post_quant_conv", latent, latent, _POINT),
    }  # fmt: skip


def _encoder(widths: list[int], layers: int, latent: int, in_time: list[bool]) -> dict[str, Shape]:
    out, place = _conv("encoder.conv_in", widths[0], 3, _CUBE), 0
    for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        for layer in range(layers):
            out |= _residual(f"encoder.down_blocks.{place}", after, after if layer else before)
            place += 1
        if level < len(in_time):
            at = f"encoder.down_blocks.{place}"
            out |= _conv(f"{at}.resample.1", after, after, (3, 3))
            out |= _conv(f"{at}.time_conv", after, after, _FRAMES) if in_time[level] else {}
            place += 1
    return out | _ends("encoder", widths[-1], widths[-1], 2 * latent)


def _decoder(widths: list[int], layers: int, latent: int, in_time: list[bool]) -> dict[str, Shape]:
    out = _conv("decoder.conv_in", widths[0], latent, _CUBE)
    for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        at = f"decoder.up_blocks.{level}"
        for layer in range(layers):  # upsampling has halved the width
            out |= _residual(f"{at}.resnets.{layer}", after, after if layer else before // 2 if level else before)
        if level < len(in_time):
            out |= _conv(f"{at}.upsamplers.0.resample.1", after // 2, after, (3, 3))
            out |= _conv(f"{at}.upsamplers.0.time_conv", 2 * after, after, _FRAMES) if in_time[level] else {}
    return out | _ends("decoder", widths[0], widths[-1], 3)


def _ends(name: str, middle: int, last: int, out: int) -> dict[str, Shape]:
    """Return a half's middle block, and its last norm and convolution."""
    at = f"{name}.mid_block"
    found = _residual(f"{at}.resnets.0", middle, middle) | _residual(f"{at}.resnets.1", middle, middle)
    found[f"{at}.attentions.0.norm.gamma"] = (middle, 1, 1)
    found |= _conv(f"{at}.attentions.0.to_qkv", 3 * middle, middle, (1, 1))
    found |= _conv(f"{at}.attentions.0.proj", middle, middle, (1, 1))
    return found | {f"{name}.norm_out.gamma": (last, *_POINT)} | _conv(f"{name}.conv_out", out, last, _CUBE)


def _residual(name: str, after: int, before: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{name}.norm1.gamma": (before, *_POINT), f"{name}.norm2.gamma": (after, *_POINT)}
    found |= _conv(f"{name}.conv1", after, before, _CUBE) | _conv(f"{name}.conv2", after, after, _CUBE)
    return found | (_conv(f"{name}.conv_shortcut", after, before, _POINT) if after != before else {})


def _conv(name: str, after: int, before: int, kernel: tuple[int, ...]) -> dict[str, Shape]:
    return {f"{name}.weight": (after, before, *kernel), f"{name}.bias": (after,)}


def statistics(config: Mapping[str, Any], where: object) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel, as the config has them.

    Raises:
        InputError: they are no numbers, not one for each channel, or a deviation is not above 0.
    """
    count, found = whole_number(_DEFAULTS | dict(config), "z_dim", where), []
    for name, least in (("latents_mean", -1e6), ("latents_std", 1e-6)):
        values: Any = config.get(name)
        fits = isinstance(values, list) and len(values) == count
        if not fits or not all(type(one) in (int, float) and least <= one < 1e6 for one in values):
            sign = "" if least < 0 else " above 0"
            raise InputError(f"{where}: {name}: found {shown(values)}, expected {count} numbers{sign}")
        found.append(values)
    return found[0], found[1]
