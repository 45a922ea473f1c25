"""Text encoders and VAE of a folder, loaded in two ways: what an export writes, and what its files are compared with.

A VAE that is written comes from the vendor's loader. What it is compared with is read by name from the weight files,
strictly and without that loader: if one of the two reads a tensor wrongly, the comparison fails. So are CLIPs for Core
ML. Elsewhere text encoders, like the transformer, are read by name, one layer at a time, see stored_encoder.py and
residency/stored.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

from edgeprune.artefact.loading import load_part
from edgeprune.artefact.resolve import read_config
from edgeprune.export import modules
from edgeprune.export.folder import from_pretrained
from edgeprune.export.frame_vae import FrameDecoder, OneFrame
from edgeprune.export.language_model import LanguageModel
from edgeprune.export.stored_clip import StoredClip, StoredPooledClip
from edgeprune.export.stored_encoder import StoredEncoder
from edgeprune.export.stored_qwen2_vl import StoredQwen2VL
from edgeprune.export.stored_qwen3 import StoredQwen3
from edgeprune.export.stored_t5 import StoredT5
from edgeprune.families.parts import VAE_QWEN_IMAGE, VAES

Load = Callable[[Path, str], Any]
"""Loads a network from its folder, given its class."""


def by_vendor(folder: Path, kind: str) -> Any:
    """Load with the loader of diffusers or transformers.

    Raises:
        InputError: the folder cannot be loaded.
    """
    return from_pretrained(getattr(diffusers if kind in VAES else transformers, kind).from_pretrained, folder)


def by_name(folder: Path, kind: str) -> Any:
    """Load tensor by tensor from the weight files.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or a file cannot be read.
    """
    return load_part(folder, kind)


def clip(artefact: Path, name: str, kind: str, load: Load) -> modules.TextEncoder:
    """Return a CLIP text encoder in float32."""
    return modules.widen(modules.TextEncoder(load(artefact / name, kind)))


Encoder = modules.TextEncoder | modules.T5Encoder | LanguageModel


_STORED: dict[str, type[StoredEncoder[Any]]] = {
    each.kind: each for each in (StoredClip, StoredPooledClip, StoredT5, StoredQwen3, StoredQwen2VL)
}


def stored_encoder(artefact: Path, name: str, kind: str) -> StoredEncoder[Any]:
    """Return a text encoder whose weights stay on disk.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or a file cannot be read.
    """
    encoder = next(each for each in read_config(artefact)[1].encoders if each.name == name)
    return _STORED[kind](artefact / name, encoder.states, padding=encoder.padding)


def compared_encoder(artefact: Path, name: str, kind: str) -> Encoder:
    """Return the text encoder that an export is compared with, in float32; it reads its layers when they run.

    Raises:
        InputError: as `by_name`.
        ParityError: as `StoredEncoder.checkpoint`.
    """
    encoder: Encoder = stored_encoder(artefact, name, kind).checkpoint()
    return encoder


def vae_decoder(artefact: Path, load: Load) -> modules.VaeDecoder:
    """Return the VAE's decoder in float32; of a VAE of videos that of one frame, folded if it is what is written."""
    kind = read_config(artefact)[1].vae
    vae = load(artefact / "vae", kind)
    if kind == VAE_QWEN_IMAGE:
        vae = FrameDecoder(vae) if load is by_vendor else OneFrame(vae)
    return modules.widen(modules.VaeDecoder(vae))
