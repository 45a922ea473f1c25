"""The T5 of an artefact in INT4, such as `text_encoder_3_int4/` beside `text_encoder_3/`: one set of integers."""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.loading import empty_part, quiet, readable
from edgeprune.artefact.manifest import MANIFEST, Manifest, packed_folder
from edgeprune.families.encoders import T5
from edgeprune.quantization.precision import T5_INT8
from edgeprune.quantization.t5 import PackedT5, prepare_t5, stored_name
from edgeprune.residency.weights import Weights


def form_of(folder: Path) -> str:
    """Return the form in which a T5's folder is exported: the artefact's, 8 bits in older ones and in originals.

    Raises:
        InputError: the manifest is damaged.
    """
    artefact = folder.parent
    return (Manifest.load(artefact).encoders if (artefact / MANIFEST).is_file() else None) or T5_INT8


def packed_t5(folder: Path) -> PackedT5 | None:
    """Return the INT4 tensors of a T5's folder, after checking hashes, names and shapes; None if it has none.

    Raises:
        InputError: they are damaged, or are not of this T5.
    """
    path = packed_folder(folder)
    if not path.is_dir():
        return None
    Manifest.load(folder.parent).verify(folder.parent, path.name)
    weights = Weights(path)
    tensors = PackedT5(weights)
    with readable(folder), quiet():
        model = prepare_t5(empty_part(folder, T5), tensors.precision)
    weights.check({stored_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return tensors
