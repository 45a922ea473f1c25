"""Text encoders and VAE of a folder, loaded in two ways: what an export writes, and what its files are compared with.

What is written comes from the vendor's loader. What it is compared with is read by name from the weight files, strictly
and without that loader: if one of the two reads a tensor wrongly, the comparison fails. (A transformer is always read
by name, see residency/stored.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from edgeprune.artefact.loading import load_part
from edgeprune.export import modules
from edgeprune.export.folder import from_pretrained
from edgeprune.families.encoders import T5
from edgeprune.families.parts import VAE
from edgeprune.quantization.quantize import quantize_t5

Load = Callable[[Path, str], Any]
"""Loads a network from its folder, given its class."""


def by_vendor(folder: Path, kind: str) -> Any:
    """Load with the loader of diffusers or transformers.

    Raises:
        InputError: the folder cannot be loaded.
    """
    # T5 in the folder's own precision: in float32, T5-XXL takes 19 GB before it is rounded.
    own: dict[str, Any] = {"dtype": "auto"} if kind == T5 else {}
    network = getattr(diffusers if kind == VAE else transformers, kind)
    return from_pretrained(lambda *given, **options: network.from_pretrained(*given, **options, **own), folder)


def by_name(folder: Path, kind: str) -> Any:
    """Load tensor by tensor from the weight files.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or a file cannot be read.
    """
    return load_part(folder, kind, None if kind == T5 else torch.float32)


def text_encoder(artefact: Path, name: str, kind: str, load: Load) -> modules.TextEncoder | modules.T5Encoder:
    """Return a text encoder in float32, T5 in 8 bits."""
    model = load(artefact / name, kind)
    return modules.widen(modules.T5Encoder(quantize_t5(model)) if kind == T5 else modules.TextEncoder(model))


def vae_decoder(artefact: Path, load: Load) -> modules.VaeDecoder:
    """Return the VAE's decoder in float32."""
    return modules.widen(modules.VaeDecoder(load(artefact / "vae", VAE)))
