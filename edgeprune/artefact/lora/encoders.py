"""The weights of a pipeline's text encoders, which a LoRA may change too."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from edgeprune.artefact.lora.merging import Differences
from edgeprune.artefact.lora.reading import Lora
from edgeprune.common.tensors import save_tensors
from edgeprune.families import Shape
from edgeprune.families.encoders import text_encoders
from edgeprune.residency.model_files import weights_of
from edgeprune.residency.weights import header


def shapes(folder: Path) -> dict[str, dict[str, Shape]]:
    """Return the shapes of each text encoder's tensors by name, by the encoder's folder, without reading data.

    Raises:
        InputError: model_index.json or a file of weights is missing or damaged.
    """
    return {
        encoder: {name: shape for path in _files(folder / encoder) for name, (shape, _) in header(path).items()}
        for encoder in text_encoders(folder)
    }


def merge(folder: Path, encoder: str, lora: Lora, scale: float) -> None:
    """Add a LoRA to a text encoder's weights, in place, one file after the other.

    Args:
        folder: the pipeline's.
        encoder: the encoder's folder.
        lora: what the file says.
        scale: multiplies what it changes.
    """
    for path in _files(folder / encoder):
        tensors = load_file(path)
        here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        differences = Differences(lora, encoder, here, tensors.__getitem__, scale)
        changed = {
            name: (t.float() + differences[name]).to(t.dtype) for name, t in tensors.items() if name in differences
        }
        if changed:
            save_tensors(path, tensors | changed, {"format": "pt"}, hashed=True)


def _files(folder: Path) -> list[Path]:
    """Return the files of an encoder's weights."""
    found = weights_of(folder)
    return [folder / name for name in found.files] if found else []
