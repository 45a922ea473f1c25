"""The T5 of an artefact in INT4, such as `text_encoder_3_int4/` beside `text_encoder_3/`: one set of integers."""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.manifest import MANIFEST, Manifest, packed_folder
from edgeprune.quantization.precision import T5_INT4, T5_INT4_WO8, T5_INT8
from edgeprune.quantization.t5 import PackedT5
from edgeprune.residency.weights import Weights


def form_of(folder: Path) -> str:
    """Return the form in which a T5's folder is exported: the artefact's, 8 bits in older ones and in originals.

    Raises:
        InputError: the manifest is damaged.
    """
    artefact = folder.parent
    return (Manifest.load(artefact).encoders if (artefact / MANIFEST).is_file() else None) or T5_INT8


def packed_t5(folder: Path) -> PackedT5 | None:
    """Return the INT4 tensors of a T5's folder, after checking their hashes; None if it is exported in another form.

    Files that an interrupted stage left behind are ignored.

    Raises:
        InputError: they are damaged.
    """
    path = packed_folder(folder)
    if form_of(folder) not in (T5_INT4, T5_INT4_WO8):
        return None
    Manifest.load(folder.parent).verify(folder.parent, path.name)
    return PackedT5(Weights(path))
