"""A reference's folder, checked before anything is loaded. Torch-free.

No code of the folder is run and no pickle is read: parts are classes of diffusers and transformers, weights are
safetensors, and every file lies in the folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import check_links, read_json
from edgeprune.families import has_family
from edgeprune.families.encoders import is_present, read_index
from edgeprune.residency.model_files import GENERATION, INDEX, model_files, part_files, parts_of, small_files

if TYPE_CHECKING:
    from edgeprune.sampling.generation import GenerationOptions

PIPELINE = "diffusers"
"""What draws a reference, where runtimes have names such as ort: the pipeline that diffusers has for it."""
_DENOISERS = ("transformer", "unet")
_OWN = ("num_inference_steps", "guidance_scale", "height", "width")
"""The fields of generation.json that a reference's may have."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Part:
    """One of a reference's networks."""

    numbers: int
    """How many weights it has."""
    stored: str
    """The dtype of its largest tensor, in safetensors' words."""
    stored_bytes: int
    """Of its weights in the file."""


@dataclass(frozen=True)
class Reference:
    """A folder that can be drawn with."""

    folder: Path
    variant: str | None
    """Of the weights, see residency/model_files.py."""
    pipeline: str
    """The class of its pipeline."""
    index: Mapping[str, Any]
    """What model_index.json holds."""
    parts: Mapping[str, Part]
    """Its networks by name."""
    denoiser: str
    """The name of the network that denoises."""
    disk_bytes: int
    """Of all weights."""
    own: GenerationOptions
    """What its generation.json sets; without that file nothing, so that the defaults of its pipeline hold."""


def is_reference(folder: Path) -> bool:
    """Return whether a folder holds a pipeline of diffusers with a UNet, or a transformer of no family.

    Raises:
        InputError: model_index.json is damaged.
    """
    if not (folder / INDEX).is_file() or (folder / "edgeprune_export.json").is_file():
        return False
    index = read_json(folder / INDEX)
    return any(is_present(index, name) for name in _DENOISERS) and not has_family(index)


def open_reference(folder: Path, variant: str | None = None) -> Reference:
    """Check a reference's folder and read the headers of its weights.

    Raises:
        InputError: a file is missing, damaged, a pickle or outside the folder, a part is code of the folder's own, or
            there is no network that denoises.
    """
    check_links(folder)
    path, index = folder / INDEX, read_index(folder)
    name = index.get("_class_name")
    if not isinstance(name, str) or "custom_pipeline" in index:
        raise InputError(
            f"{path}: names code of its own, expected a pipeline of diffusers; code of a folder is not run"
        )
    names = parts_of(index)
    for part in names:
        if not (folder / part).is_dir():
            raise InputError(f"{folder / part}: no such folder, though {INDEX} lists it")
        _check_code(folder / part)
    denoiser = next((part for part in _DENOISERS if part in names), None)
    if denoiser is None:
        raise InputError(f"{path}: {name}: found neither {' nor '.join(_DENOISERS)}, expected one to draw with")
    parts = {part: found for part in names if (found := _part(folder / part, variant))}
    if denoiser not in parts:
        raise InputError(f"{folder / denoiser}: found no weights, expected safetensors")
    size = sum(file.stat().st_size for file in model_files(folder, variant) if file.suffix == ".safetensors")
    return Reference(folder, variant, name, index, parts, denoiser, size, _own_settings(folder / GENERATION))


def _check_code(folder: Path) -> None:
    """Refuse a part whose config names code of its own."""
    for path in small_files(folder):
        # As text: schedulers are saved with -Infinity, which `read_json` refuses.
        if path.name.endswith("config.json") and b'"auto_map"' in path.read_bytes():
            raise InputError(f"{path}: auto_map: names code of its own, which is not run; remove the field")


def _part(folder: Path, variant: str | None) -> Part | None:
    """Return what the headers of a part's weights say; None without weights, of a tokenizer for one."""
    from edgeprune.residency.weights import header

    files = [path for path in part_files(folder, variant) if path.suffix == ".safetensors"]
    tensors = [(math.prod(shape), kind) for path in files for shape, kind in header(path).values()]
    floats = [(count, kind) for count, kind in tensors if kind in _BYTES]
    if not floats:
        return None
    return Part(sum(n for n, _ in floats), max(floats)[1], sum(n * _BYTES[kind] for n, kind in floats))


def _own_settings(path: Path) -> GenerationOptions:
    """Read a generation.json, if there is one.

    Raises:
        InputError: it has other fields, or a value that is no number above 0.
    """
    from edgeprune.sampling.generation import GenerationOptions

    data = read_json(path) if path.is_file() else {}
    for name, value in data.items():
        if name not in _OWN:
            raise InputError(f"{path}: {shown(name)}: of a reference, expected only {', '.join(_OWN)}")
        kinds = (int, float) if name == "guidance_scale" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < (0 if name == "guidance_scale" else 1):
            raise InputError(f"{path}: {name}: found {shown(value)}, expected a number above 0")
    return GenerationOptions(**data)
