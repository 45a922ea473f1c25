"""Describes what a device can run, as data: one TOML file per device in this folder, read into a `Target`.

A target lists the formats and runtimes that a device uses, its memory, and the weights and shapes that it takes. It has
no measured speed (see `edgeprune bench`) and nothing that is specific to one model.
"""

from __future__ import annotations

# pyproject.toml maps the folder to this name; under another name it would be imported twice.
if __name__ != "edgeprune.targets":
    raise ImportError(f"this package is edgeprune.targets, not {__name__}; run: pip install -e .")

import sys
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, get_type_hints

from edgeprune.common.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULTS", "Target", "for_format", "load", "names"]


@dataclass(frozen=True)
class Target:
    """One device, as described by its TOML file."""

    name: str
    """The file's name without .toml, as passed to `--device`."""
    description: str
    """One line for readers."""
    formats: tuple[str, ...]
    """The formats that `edgeprune export --target` can write for it, the preferred one first."""
    runtimes: tuple[str, ...]
    """The modules of edgeprune.runtimes that run on it, the preferred one first."""
    requires: str
    """The minimum system: OS version, compute capability."""
    memory_bytes: int
    """Memory that a model may use on the device, for all networks and activations together."""
    memory_source: str
    """Where `memory_bytes` comes from."""
    own_memory: bool
    """Whether what computes has memory of its own, beside the processor's, from which weights can be streamed."""
    dtypes: tuple[str, ...]
    """Weight formats that the runtime takes, the smallest first."""
    activations: str
    """The precision it computes in: float32 or float16."""
    int4_group_sizes: tuple[int, ...]
    """Sizes of INT4 groups (along the input) that it takes, the best first."""
    int4_symmetric_only: bool
    """True if INT4 weights must not have zero points."""
    opset: int
    """ONNX opset to export with; 0 if the runtime does not read ONNX."""
    batch: tuple[int, ...]
    """Smallest batch, which is 1, and largest batch of one step. Guidance takes two rows per image; more images than
    fit run in several batches."""
    side: tuple[int, ...]
    """Smallest and largest height and width in pixels, for models that support such sizes."""
    chunks: int
    """Number of chunks that the transformer is split into; more than 1 if the device rejects large files."""


DEFAULTS = {"onnx": "cpu-x86", "openvino": "cpu-x86", "trt": "rtx", "coreml": "macbook-m"}
"""The target that `edgeprune export --target FORMAT` uses without `--device`."""


def for_format(fmt: str, device: str | None = None) -> Target:
    """Return the target to export for.

    Raises:
        InputError: the format or device is unknown, or the device does not take the format.
    """
    if fmt not in DEFAULTS:
        raise InputError(f"--target: found {fmt!r}, expected one of {', '.join(DEFAULTS)}")
    target = load(device or DEFAULTS[fmt])
    if fmt not in target.formats:
        raise InputError(
            f"--device: found {target.name}, which takes {', '.join(target.formats)}, expected one that takes {fmt}"
        )
    return target


def names() -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml"))


def load(name: str) -> Target:
    """Read a target by its name.

    Raises:
        InputError: there is no such target, or its file does not have exactly the fields of `Target`.
    """
    if name not in names():
        raise InputError(f"target: found {name!r}, expected one of {', '.join(names())}")
    return parse(name, (files(__name__) / f"{name}.toml").read_text("utf-8"))


def parse(name: str, text: str) -> Target:
    """Read a target from the text of its TOML file.

    Raises:
        InputError: the text is not TOML, or a field is missing, unknown or of another type.
    """
    try:
        record = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}.toml: not TOML: {error}") from error
    expected = {f.name for f in fields(Target)} - {"name"}
    if unlike := sorted(expected ^ record.keys()):
        raise InputError(
            f"{name}.toml: {', '.join(unlike)}: missing or unknown, expected {', '.join(sorted(expected))}"
        )
    kinds = get_type_hints(Target)
    target = Target(name=name, **{key: _value(name, key, value, kinds[key]) for key, value in record.items()})
    for key in ("batch", "side"):
        value = getattr(target, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise InputError(f"{name}.toml: {key}: found {list(value)}, expected the smallest and the largest")
    if target.batch[0] != 1:
        raise InputError(f"{name}.toml: batch: found {list(target.batch)}, expected 1 first: images are decoded singly")
    return target


def _value(name: str, key: str, value: Any, kind: Any) -> Any:
    """Check the type of a field's value and turn a list into a tuple."""
    items = getattr(kind, "__args__", None)
    if items and isinstance(value, list):
        return tuple(_value(name, key, item, items[0]) for item in value)
    # `type is`, because True is an int to isinstance.
    if items or type(value) is not kind:
        raise InputError(f"{name}.toml: {key}: found {value!r}, expected {'a list' if items else kind.__name__}")
    if kind is int and value < 0:
        raise InputError(f"{name}.toml: {key}: found {value}, expected 0 or more")
    return value
