"""The image size of an export whose device or format does not take every size."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from edgeprune.artefact.resolve import read_config
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.sampling.generation import Generation, latent_factor
from edgeprune.targets import Target


def generation_for(artefact: Path, device: Target) -> Generation:
    """Return the artefact's generation defaults, with the image size clipped to the device and the position table.

    Warns in one line where the size is clipped.

    Raises:
        InputError: the artefact's height or width is not a whole number of tokens.
    """
    generation = Generation.load(artefact)
    config, family = read_config(artefact)
    space = family.latents(config)
    unit = space.patch * factor_of(artefact)
    tokens = device.side[1] // unit
    most = min(tokens, space.largest or tokens) * unit
    for field in ("height", "width"):
        pixels = getattr(generation, field)
        if pixels % unit:
            raise InputError(f"{artefact / 'generation.json'}: {field}: found {pixels}, expected a multiple of {unit}")
    clipped = dataclasses.replace(generation, height=min(generation.height, most), width=min(generation.width, most))
    if clipped != generation:
        warnings.warn(
            f"{device.name}: images of {clipped.width}x{clipped.height} pixels, not the model's own "
            f"{generation.width}x{generation.height}: the device takes at most {most}",
            stacklevel=2,
        )
    return clipped


def factor_of(artefact: Path) -> int:
    """Return the pixels per latent pixel."""
    path = artefact / "vae" / "config.json"
    return latent_factor(read_json(path), path)
