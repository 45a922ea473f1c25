"""Checks whether a folder can be exported for a device, before any work and any heavy import; reads file headers.

Memory is not checked here: `--fit` plans for it before pruning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.convert.opening import refuse_file
from edgeprune.artefact.manifest import recorded_encoders
from edgeprune.artefact.resolve import nearby, read_config
from edgeprune.common.errors import InputError
from edgeprune.families.encoders import check_tokens
from edgeprune.sampling.generation import Generation
from edgeprune.targets import Target


def pipeline(artefact: Path) -> dict[str, Any]:
    """Read model_index.json and check that the pipeline can be exported.

    Raises:
        InputError: `artefact` is no pipeline of a family, or a part is missing or cannot be exported.
    """
    path = artefact / "model_index.json"
    if not artefact.is_dir():
        raise refuse_file(artefact) if artefact.exists() else InputError(f"{artefact}: no such folder")
    if not path.is_file():
        where = nearby(artefact)
        raise InputError(f"{artefact}: no model_index.json; expected an artefact or a diffusers folder{where}")
    _, family = read_config(artefact)
    index = check_pipeline(artefact)
    check_tokens(artefact, family.encoders, Generation.load(artefact).max_sequence_length)
    return index


def check(artefact: Path, device: Target) -> None:
    """Refuse INT4 weights that the device does not take; folders with float weights pass.

    Raises:
        InputError: the device takes no INT4 weights, none with zero points or none of this group size, or a weight file
            is damaged.
    """
    for name in ("transformer_int4", *recorded_encoders(artefact)):
        _check(artefact / name, device)


def _check(folder: Path, device: Target) -> None:
    if device.int4_symmetric_only:
        for name in _shapes(folder):
            if name.endswith("zero_point"):
                raise InputError(
                    f"{folder}: {name}: found zero points (asymmetric INT4), expected symmetric for {device.name}"
                )
    for size, layer in sorted(group_sizes(folder).items()):
        if "int4" not in device.dtypes:
            raise InputError(
                f"{folder}: found INT4 weights, expected {' or '.join(device.dtypes)}, which {device.name} takes"
            )
        if size not in device.int4_group_sizes:
            taken = ", ".join(str(s) for s in sorted(device.int4_group_sizes))
            raise InputError(
                f"{folder}: {layer}: group size: found {size}, expected one of {taken}, which {device.name} takes; "
                "see edgeprune quantize --group-size"
            )


def group_sizes(folder: Path) -> dict[int, str]:
    """Return the INT4 group sizes in `transformer_int4`, each with the first layer that has it; empty without a folder.

    Layers with a single group are skipped: 8-bit layers have one, and for a runtime it is one scale per output.

    Raises:
        InputError: a weight file is damaged.
    """
    first_layers: dict[int, str] = {}
    shapes = _shapes(folder)
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight_packed")
        groups = shapes.get(f"{layer}.weight_scale", [0, 0])[1]
        if layer != name and groups > 1:
            first_layers.setdefault(2 * shape[1] // groups, layer)
    return first_layers


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a folder's safetensors files, from their headers."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
    return shapes
