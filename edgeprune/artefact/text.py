"""A T5 or Qwen3 of an artefact in INT4, such as `text_encoder_3_int4/` beside `text_encoder_3/`."""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.manifest import MANIFEST, Manifest, packed_folder
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT4_WO8, TEXT_INT8
from edgeprune.quantization.text import PackedText
from edgeprune.residency.weights import Weights


def form_of(folder: Path) -> str:
    """Return the form in which a text encoder's folder is exported; 8 bits in originals and older artefacts.

    Raises:
        InputError: the manifest is damaged.
    """
    artefact = folder.parent
    return (Manifest.load(artefact).encoders if (artefact / MANIFEST).is_file() else None) or TEXT_INT8


def packed_text(folder: Path) -> PackedText | None:
    """Return the INT4 tensors of a text encoder's folder, hashes checked; None if it has another form.

    Files that an interrupted stage left behind are ignored.

    Raises:
        InputError: they are damaged.
    """
    path = packed_folder(folder)
    if form_of(folder) not in (TEXT_INT4, TEXT_INT4_WO8):
        return None
    Manifest.load(folder.parent).verify(folder.parent, path.name)
    return PackedText(Weights(path))
