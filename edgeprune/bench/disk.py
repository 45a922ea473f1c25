"""Bytes of a model's weights: the files on disk, and the transformer in the precision that computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeprune.artefact.manifest import packed_encoders, recorded_encoders
from edgeprune.common.errors import InputError
from edgeprune.residency.model_files import weights_of
from edgeprune.runtimes.modulation import ROWS

_BYTES_PER_WEIGHT = {"bf16": 2, "fp16": 2, "fp32": 4}


def disk_bytes(folder: Path, variant: str | None = None) -> dict[str, int]:
    """Return transformer_disk_bytes and total_disk_bytes of the files that generation reads; `variant` of weights.

    The modulation is part of the transformer, also where an export has it apart.
    """
    transformer = sum(p.stat().st_size for part in _parts(folder) for p in _weight_files(part, variant))
    # Generation does not read an artefact's half precision where there is INT4.
    recorded = recorded_encoders(folder)
    packed = [name.removesuffix("_int4") for name in recorded]
    unread = [name for name in packed_encoders(folder) if name not in recorded]
    skipped = ("transformer", "transformer_int4", "unet", ROWS, "cache", *packed, *unread)
    others = [d for d in folder.iterdir() if d.is_dir() and d.name not in skipped]
    rest = sum(p.stat().st_size for d in others for p in _weight_files(d, variant))
    return {"transformer_disk_bytes": transformer, "total_disk_bytes": transformer + rest}


def weights_bytes(folder: Path, precision: str, variant: str | None = None, *, each_step: bool = False) -> int:
    """Return the bytes of the transformer's weights in the precision that computes; files may hold another one.

    Args:
        folder: an export, an artefact or a diffusers folder.
        precision: `bf16`, `fp16` or `fp32`; with any other the bytes of the files count.
        variant: of the weights.
        each_step: without the modulation of an export that has it apart, which no step reads.

    Raises:
        InputError: a safetensors file is damaged.
    """
    parts = [_transformer(folder)] if each_step else _parts(folder)
    files = [path for part in parts for path in _weight_files(part, variant)]
    if precision not in _BYTES_PER_WEIGHT or any(p.suffix != ".safetensors" for p in files):
        return sum(p.stat().st_size for p in files)
    return sum(_weight_count(p) for p in files) * _BYTES_PER_WEIGHT[precision]


def _parts(folder: Path) -> list[Path]:
    """Return the folders of the transformer: its own, and that of a modulation apart."""
    return [_transformer(folder), *([folder / ROWS] if (folder / ROWS).is_dir() else [])]


def _transformer(folder: Path) -> Path:
    """Return the folder of the network that denoises; of a reference it may be a UNet."""
    found = (folder / name for name in ("transformer_int4", "unet") if (folder / name).is_dir())
    return next(found, folder / "transformer")


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files that a component's runtime loads: an export's, or one variant of safetensors."""
    patterns = ("model.onnx*", "openvino_model.*", "model.engine", "*.mlpackage/**/weight.bin")
    exported = [p for pattern in patterns for p in folder.glob(pattern) if p.is_file()]
    weights = None if exported else weights_of(folder, variant)
    return exported or [folder / name for name in (weights.files if weights else ())]


def _weight_count(path: Path) -> int:
    """Return how many numbers a safetensors file holds; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return sum(int(np.prod(file.get_slice(key).get_shape(), dtype=np.int64)) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None
