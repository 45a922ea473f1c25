"""Checks whether a device takes an artefact's weights, before any work starts; reads only file headers.

Memory is not checked here: `--fit` plans for it before pruning.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import InputError
from edgeprune.targets import Target


def check(artefact: Path, device: Target) -> None:
    """Refuse INT4 weights that the device does not take; folders with float weights pass.

    Raises:
        InputError: the device takes no INT4 weights, none with zero points or none of this group size, or a weight file
            is damaged.
    """
    folder = artefact / "transformer_int4"
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
