"""What FLUX.1 and FLUX.2 share: two by two latent pixels packed into one token, and rotary positions.

Packing works on numpy arrays and torch tensors alike. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeprune.families.architecture import Config, LatentSpace, Shape, config_number
from edgeprune.families.network import Array, Axes

if TYPE_CHECKING:
    import torch

PATCH = 2
_THETA = 10_000


def latent_space(config: Config) -> LatentSpace:
    """Return the latent space of packed tokens; `in_channels` counts the channels of a token."""
    return LatentSpace(channels=config_number(config, "in_channels") // PATCH**2, patch=PATCH)


def grid_of(latents: Array) -> tuple[int, int]:
    """Return rows and columns of tokens of latents (B, C, h, w)."""
    return latents.shape[2] // PATCH, latents.shape[3] // PATCH


def pack(latents: Array) -> Array:
    """Pack latents (B, C, h, w) into tokens (B, N, 4 C)."""
    b, c, _, _ = latents.shape
    rows, columns = grid_of(latents)
    # (B, C, i, p, j, q) to (B, i, j, C, p, q); numpy and torch share swapaxes, not permute.
    tokens = latents.reshape(b, c, rows, PATCH, columns, PATCH).swapaxes(1, 2).swapaxes(2, 4).swapaxes(3, 4)
    return tokens.reshape(b, rows * columns, c * PATCH**2)


def unpack(tokens: Array, shape: Shape) -> Array:
    """Undo `pack`: tokens (B, N, 4 C) to latents of `shape` (B, C, h, w)."""
    b, c, h, w = shape
    split = tokens.reshape(b, h // PATCH, w // PATCH, c, PATCH, PATCH)
    return split.swapaxes(3, 4).swapaxes(2, 4).swapaxes(1, 2).reshape(b, c, h, w)


def axes(*, pooled: bool, guidance: bool) -> tuple[Axes, Axes]:
    """Return the dynamic axes of inputs and output, named as optimum names FLUX.1's."""
    image = {0: "batch_size", 1: "packed_height_width"}
    inputs: Axes = {"hidden_states": image, "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"}}
    if pooled:
        inputs = {**inputs, "pooled_projections": {0: "batch_size"}}
    inputs = {
        **inputs,
        "timestep": {0: "batch_size"},
        "img_ids": {0: "packed_height_width"},
        "txt_ids": {0: "sequence_length"},
    }
    if guidance:
        inputs = {**inputs, "guidance": {0: "batch_size"}}
    return inputs, {"out_hidden_states": image}


def rotary(model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False) -> tuple[torch.Tensor, ...]:
    """Return cosine and sine of the rotary embedding, (M + N, head width) each.

    diffusers computes it in float64, which TensorRT and Core ML lack; this is float32. Angles stay below a few hundred,
    where float32 is off by 1e-5.

    Args:
        model: the transformer.
        inputs: its inputs by name.
        exact: let diffusers compute it.
    """
    import torch

    if exact:
        text, image = (model.pos_embed(inputs[name]) for name in ("txt_ids", "img_ids"))
        return tuple(torch.cat(pair) for pair in zip(text, image, strict=True))
    ids = torch.cat((inputs["txt_ids"], inputs["img_ids"])).float()
    theta = model.config.get("rope_theta", _THETA)  # only FLUX.2's config names it
    angles = []
    for axis, size in enumerate(model.config.axes_dims_rope):
        speeds = [float(theta ** (-i / size)) for i in range(0, size, 2)]
        angles.append(ids[:, axis, None] * torch.tensor(speeds, device=ids.device))
    # Neighbouring channels share an angle.
    twice = torch.cat(angles, dim=-1)[..., None].expand(-1, -1, 2).flatten(1)
    return twice.cos(), twice.sin()
