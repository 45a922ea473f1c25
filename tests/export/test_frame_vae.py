"""A VAE of videos on one frame: folded to two axes it computes what diffusers' own layers compute."""

from __future__ import annotations

import pytest
import tiny
import torch

from edgeprune.export.frame_vae import FrameDecoder, OneFrame
from edgeprune.export.modules import VaeDecoder


@torch.no_grad()
@pytest.mark.parametrize("size", [(2, 6, 4), (1, 5, 7)])
def test_the_folded_decoder_is_that_of_diffusers(size: tuple[int, int, int]) -> None:
    batch, height, width = size
    folded, vae = VaeDecoder(FrameDecoder(tiny.tiny_vae_qwen_image())), tiny.tiny_vae_qwen_image()
    latents = folded.example(batch=batch, height=height, width=width)["latent_sample"]
    (found,), (plain,) = folded(latents), VaeDecoder(OneFrame(vae))(latents)
    whole = vae.decode(latents[:, :, None]).sample
    assert whole.shape == (batch, 3, 1, 8 * height, 8 * width) and found.shape == whole[:, :, 0].shape
    assert found.std() > 0.3 and found.abs().max() > 1  # diffusers clamps
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.clamp(-1, 1), whole[:, :, 0], rtol=1e-5, atol=1e-5)
    assert not [name for name, tensor in folded.state_dict().items() if tensor.ndim > 4 or "time_conv" in name]


@torch.no_grad()
def test_half_precision_does_not_overflow() -> None:
    """The squares of 300 would."""
    folded = FrameDecoder(tiny.tiny_vae_qwen_image())
    norm, x = folded.decoder.norm_out.half(), torch.full((1, 8, 2, 2), 300.0, dtype=torch.float16)
    assert torch.isfinite(norm(x)).all()
