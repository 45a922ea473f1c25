"""The scale between a VAE's latents and the transformer's, one number or one by channel. Torch-free.

SD3 and FLUX.1 have a scaling and a shift factor in the VAE's config. FLUX.2's VAE has a batch norm, whose statistics
normalise each channel of two by two latent pixels packed together; an export writes them to its VAE's config.
Qwen-Image's VAE has statistics of each channel in its config.

Latents are numpy arrays or torch tensors (B, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import real_number, shown
from edgeprune.families.parts import VAE_FLUX2, VAE_QWEN_IMAGE
from edgeprune.families.vae_qwen_image import statistics

Array = NDArray[np.float32]
Latents = Any
"""A numpy array or a torch tensor (B, C, h, w)."""
MEAN, STD = "batch_norm_mean", "batch_norm_std"
"""Fields of an export's vae_decoder/config.json: statistics of each packed channel, C first, then row and column."""
_PATCH = 2


class Scale(Protocol):
    """Between the latents of a VAE and those of the transformer."""

    def to_vae(self, latents: Latents) -> Latents:
        """Return what the VAE decodes."""

    def from_vae(self, latents: Latents) -> Latents:
        """Return what the transformer gets of what the VAE encoded."""


@dataclass(frozen=True)
class Factors:
    """One scaling factor and one shift for all channels."""

    scaling: float
    shift: float

    def to_vae(self, latents: Latents) -> Latents:
        """Return latents / scaling + shift."""
        return latents / self.scaling + self.shift

    def from_vae(self, latents: Latents) -> Latents:
        """Return (latents - shift) * scaling."""
        return (latents - self.shift) * self.scaling


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each packed channel: two arrays or tensors (4 C)."""

    mean: Any
    std: Any

    def to_vae(self, latents: Latents) -> Latents:
        """Return latents * std + mean."""
        mean, std = (_by_pixel(values) for values in (self.mean, self.std))
        return (_split(latents) * std + mean).reshape(latents.shape)

    def from_vae(self, latents: Latents) -> Latents:
        """Return (latents - mean) / std."""
        mean, std = (_by_pixel(values) for values in (self.mean, self.std))
        return ((_split(latents) - mean) / std).reshape(latents.shape)


def _split(latents: Latents) -> Any:
    """Return latents as (B, C, h / 2, 2, w / 2, 2)."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // _PATCH, _PATCH, w // _PATCH, _PATCH)


def _by_pixel(values: Any) -> Any:
    """Return statistics (4 C) as (C, 1, 2, 1, 2)."""
    return values.reshape(-1, 1, _PATCH, 1, _PATCH)


def scale_of(vae: Any) -> Scale:
    """Return the scale of a loaded VAE of diffusers; statistics are float32 tensors where its weights are."""
    if hasattr(vae, "bn"):
        return Statistics(vae.bn.running_mean.float(), (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt())
    if type(vae).__name__ == VAE_QWEN_IMAGE:
        like = vae.post_quant_conv.bias.float()
        return Statistics(*(like.new_tensor(values) for values in by_channel(vae.config)))
    return factors(vae.config)


def decoded(vae: Any, latents: Any) -> Any:
    """Return the images (B, 3, H, W) that a loaded VAE makes of its latents (B, C, h, w); of one of videos, a frame."""
    if type(vae).__name__ == VAE_QWEN_IMAGE:
        return vae.decode(latents[:, :, None]).sample[:, :, 0]
    return vae.decode(latents).sample


def encoded_mean(vae: Any, images: Any) -> Any:
    """Return the mean of the latents (B, C, h, w) that a loaded VAE encodes images (B, 3, H, W) to."""
    if type(vae).__name__ == VAE_QWEN_IMAGE:
        return vae.encode(images[:, :, None]).latent_dist.mean[:, :, 0]
    return vae.encode(images).latent_dist.mean


def by_channel(vae: Mapping[str, Any], where: object = "vae/config.json") -> tuple[Array, Array]:
    """Return mean and deviation of each packed channel from a config that has those of each channel.

    Raises:
        InputError: they are not one number for each channel.
    """
    mean, std = (np.repeat(np.asarray(values, np.float32), _PATCH**2) for values in statistics(vae, where))
    return mean, std


def exported_scale(vae: Mapping[str, Any], kind: str, where: object) -> Scale:
    """Return the scale that the config of an exported VAE decoder has.

    Args:
        vae: the content of its config.json.
        kind: the class of the VAE, as the family has it; it decides, not what the file has.
        where: that file, for messages.

    Raises:
        InputError: as `factors`; or statistics are missing, are no numbers, or not one for each packed channel; or a
            standard deviation is not above 0.
    """
    if kind == VAE_QWEN_IMAGE:
        return Statistics(*by_channel(vae, where))
    if kind != VAE_FLUX2:
        return factors(vae, where)
    mean, std = (_numbers(vae, name, where) for name in (MEAN, STD))
    if not std.min() > 0:
        raise InputError(f"{where}: {STD}: found {std.min():g}, expected numbers above 0")
    return Statistics(mean, std)


def check_variance(variance: Any, where: object) -> None:
    """Check the variance of each packed channel, a tensor (4 C): no number below 0, and each one finite.

    Raises:
        InputError: it holds another number.
    """
    for value in variance.tolist():
        if not 0 <= value < math.inf:
            raise InputError(f"{where}: bn.running_var: found {value:g}, expected numbers from 0")


def _numbers(vae: Mapping[str, Any], name: str, where: object) -> NDArray[np.float32]:
    values, count = vae.get(name), vae.get("latent_channels", 32)
    fits = isinstance(values, list) and type(count) is int and len(values) == _PATCH**2 * count
    if not fits or not all(type(one) in (int, float) and abs(one) < 1e6 for one in values or []):
        raise InputError(f"{where}: {name}: found {shown(values)}, expected four numbers for each latent channel")
    return np.asarray(values, np.float32)


def factors(vae: Mapping[str, Any], where: object = "vae/config.json") -> Factors:
    """Return scaling and shift factor of a VAE's config: the transformer's latents are (x - shift) * scaling.

    A shift of null, as older VAEs have, is 0. A missing scaling factor is AutoencoderKL's default.

    Raises:
        InputError: a factor is not a number, or the scaling factor is not above 0.
    """
    shift = 0.0 if vae.get("shift_factor") is None else vae["shift_factor"]
    found = {"scaling_factor": vae.get("scaling_factor", 0.18215), "shift_factor": shift}
    scaling = real_number(found, "scaling_factor", where, least=1e-6, most=1e6)
    return Factors(scaling, real_number(found, "shift_factor", where, least=-1e6, most=1e6))
