"""AutoencoderKLQwenImage's decoder for one frame: its convolutions over time and space become ones over space alone.

The VAE is one of videos. Of an image's only frame, all frames before are zeros, so of each kernel's times only the last
counts; and upsampling in time begins after the first frame. `FrameDecoder` has no other approximation, and a third of
the work. `OneFrame` is what it is compared with: diffusers' own layers.

Notation: B batch, C channels, h w height and width, N tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageRMS_norm,
)
from torch import nn
from torch.nn import functional as F

_LEAST = 1e-24
"""The square of the least length that diffusers divides by."""


class FrameDecoder(nn.Module):
    """The decoder on latents (B, C, h, w). Takes the layers of a VAE over."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config: Any = vae.config
        self.post_quant_conv, self.decoder = _flat(vae.post_quant_conv), vae.decoder
        _flatten(self.decoder)

    def decode(self, latents: torch.Tensor, *, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Return images (B, 3, 8 h, 8 w), which diffusers clamps to -1..1."""
        return (self.decoder(self.post_quant_conv(latents)),)


class OneFrame(nn.Module):
    """The decoder as diffusers has it, with a time axis of one frame."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config: Any = vae.config
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def decode(self, latents: torch.Tensor, *, return_dict: bool = False) -> tuple[torch.Tensor]:
        """See FrameDecoder."""
        return (self.decoder(self.post_quant_conv(latents[:, :, None]))[:, :, 0],)


def _flatten(network: nn.Module) -> None:
    """Replace the layers below a module that have a time axis, in place."""
    for name, child in list(network.named_children()):
        if isinstance(child, (QwenImageCausalConv3d, QwenImageRMS_norm, QwenImageAttentionBlock, QwenImageResample)):
            setattr(network, name, _flat(child))
        else:
            _flatten(child)


def _flat(layer: Any) -> nn.Module:
    """Return what a layer with a time axis does to one frame."""
    if isinstance(layer, QwenImageRMS_norm):
        return FrameNorm(layer)
    if isinstance(layer, QwenImageAttentionBlock):
        return FrameAttention(layer)
    if isinstance(layer, QwenImageResample):
        return FrameUpsample(layer)
    _, rows, columns = layer.kernel_size
    flat = nn.Conv2d(layer.in_channels, layer.out_channels, (rows, columns), padding=(rows // 2, columns // 2))
    with torch.no_grad():
        flat.weight, flat.bias = nn.Parameter(layer.weight[:, :, -1].clone()), layer.bias
    return flat


class FrameNorm(nn.Module):
    """Divides each pixel's channels by their root mean square; in float32, because squares overflow half precision."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.detach().reshape(1, -1, 1, 1) * norm.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, h, w) to the same shape."""
        wide = x.float()
        length = ((wide * wide).sum(1, keepdim=True) + _LEAST).sqrt()
        return (wide / length).type_as(x) * self.gamma


class FrameAttention(nn.Module):
    """Self-attention of the pixels with one head; three layers instead of a fused one, as AutoencoderKL has them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm = FrameNorm(block.norm)
        layers = zip(block.to_qkv.weight.detach().chunk(3), block.to_qkv.bias.detach().chunk(3), strict=True)
        self.to_q, self.to_k, self.to_v = (_linear(weight, bias) for weight, bias in layers)
        self.proj = _linear(block.proj.weight.detach(), block.proj.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, h, w) to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        out = self.proj(F.scaled_dot_product_attention(query, key, value).squeeze(1))
        return x + cast("torch.Tensor", out).transpose(1, 2).reshape(x.shape)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return the linear layer of a convolution with a kernel of one pixel."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.flatten(1).clone()), nn.Parameter(bias.clone())
    return layer


class FrameUpsample(nn.Module):
    """Doubles height and width; of two, the nearest pixel is the exactly nearest one."""

    def __init__(self, resample: Any) -> None:
        super().__init__()
        self.conv = resample.resample[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, h, w) to (B, C / 2, 2 h, 2 w)."""
        return cast("torch.Tensor", self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
