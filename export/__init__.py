"""Exports an artefact to a device's format: ONNX, OpenVINO, TensorRT or Core ML, each compared with the checkpoint.

Each format has a file to_*.py in this folder (`FORMATS`) with a function `export(artefact, out, device=...,
progress=...)`. Those of `APART_FORMATS` also take `modulation=...`.

This file imports nothing heavy. It refuses any other import name: with the project root on `sys.path` the folder could
also be imported as `export`, and the custom op would be translated twice.
"""

from __future__ import annotations

if __name__ != "edgeprune.export":
    raise ImportError(f"import this package as edgeprune.export, not as {__name__}")

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.common import extras, heap
from edgeprune.common.errors import InputError
from edgeprune.export import accepts
from edgeprune.targets import Target

FORMATS = sorted(path.stem.removeprefix("to_") for path in Path(__file__).parent.glob("to_*.py"))
"""The formats that can be written: coreml, onnx, ..."""

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "coreml": ("coreml", ("coremltools",)),
    "onnx": ("onnx", ("onnxruntime",)),
    "openvino": ("openvino", ("openvino", "openvino_tokenizers")),
    "trt": ("onnx,trt", ("onnxruntime", "tensorrt|tensorrt_rtx")),
}
"""By format: the extras that its export needs in addition to `compress`, and their packages; `a|b` is either."""

APART, INSIDE = "apart", "inside"
"""Where an export has the modulation: in a network of its own, or in the transformer (modulation.py)."""
APART_FORMATS = ("onnx", "openvino", "trt")
"""Formats that are written with the modulation apart, unless it is asked for inside."""


def export(
    artefact: Path,
    out: Path,
    fmt: str,
    device: Target,
    *,
    modulation: str | None = None,
    progress: Callable[..., None],
) -> dict[str, Any]:
    """Write the folder `out` in one of FORMATS for a device.

    An interrupted export leaves `OUT.partial`; the next call with the same arguments resumes there.

    Args:
        artefact: the artefact's folder, or a diffusers folder.
        out: the folder to write.
        fmt: one of FORMATS.
        device: what the export is for.
        modulation: APART or INSIDE; None for APART where the format has it.
        progress: see progress.Progress.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        MissingExtraError: a package that the format needs is not installed.
        InputError: `artefact` or `out` is not usable, the device cannot run the artefact, or the format has no such
            modulation.
        ParityError: a network does not compute what its checkpoint computes.
        DiskError: the disk is full, or `out` cannot be written.
    """
    if fmt not in FORMATS:
        raise InputError(f"--target: found {fmt!r}, expected one of {', '.join(FORMATS)}")
    forms = [APART, INSIDE] if fmt in APART_FORMATS else [INSIDE]
    if modulation not in (None, *forms):
        raise InputError(f"--modulation: found {modulation!r}, expected {' or '.join(forms)} for {fmt}")
    accepts.check(artefact, device)
    accepts.pipeline(artefact)
    extra, packages = NEEDS[fmt]
    extras.require(extras.COMPRESS, f"compress,{extra}")
    # Which TensorRT is needed depends on the device; to_trt.py checks that.
    extras.require(tuple(package for package in packages if "|" not in package), extra)
    module = importlib.import_module(f"edgeprune.export.to_{fmt}")
    options = {"modulation": modulation or APART} if fmt in APART_FORMATS else {}
    with heap.returned():
        written: dict[str, Any] = module.export(artefact, out, device=device, progress=progress, **options)
    return written
