"""The input of the adaLN modulation layers, as the text encoders and the sampler make it: measured for several stages.

Notation: T noise levels, D width.
"""

from __future__ import annotations

import torch

from edgeprune.planning.modulation import modulation_inputs
from edgeprune.sampling.denoising import encode_pooled, latent_shape, sigmas
from edgeprune.stages.workspace import Workspace

MODULATION = "modulation.safetensors"
"""Mean (D) and basis (R, D) of the modulation input; written by `plan` where it projects the modulation to R
directions."""


@torch.no_grad()
def modulation_mean(ws: Workspace, prompts: list[str]) -> torch.Tensor:
    """Return the mean modulation input (D) over the sampler's evaluations of these prompts.

    With classifier-free guidance half of the evaluations are of the empty prompt.
    """
    inputs = inputs_of(ws, ["", *prompts], sampler_levels(ws)).mean(1)
    return (inputs[0] + inputs[1:].mean(0)) / 2 if is_guided(ws) else inputs[1:].mean(0)


def is_guided(ws: Workspace) -> bool:
    """Return whether each step is evaluated a second time, with the empty prompt."""
    return ws.family.guided(ws.config, ws.generation.guidance_scale)


def sampler_levels(ws: Workspace) -> torch.Tensor:
    """Return the sampler's noise levels (T) without the last, which is 0."""
    return sigmas(ws.encoders, ws.generation, latent_shape(ws.encoders, ws.generation))[:-1]


def inputs_of(ws: Workspace, prompts: list[str], levels: torch.Tensor) -> torch.Tensor:
    """Return the modulation inputs (prompts, T, D) of these prompts at these noise levels (T)."""
    pooled = encode_pooled(ws.encoders, prompts, ws.generation.max_sequence_length)
    found = modulation_inputs(ws.family, ws.encoders.transformer, levels * 1000, pooled, ws.generation.guidance_scale)
    return found.cpu()  # what follows needs float64, which some devices lack
