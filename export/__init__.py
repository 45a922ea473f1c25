"""An artefact becomes a format's folder: one translation of the quantised layer per format, gated by parity.

`FORMATS` are the to_*.py beside this file, each with `export(artefact, out, device=..., progress=...)`. This `__init__`
imports nothing heavy and refuses any other import name: with the project root on `sys.path` the folder would also be
importable as `export`, and two copies of the custom op's translation would exist.
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
"""What can be written: coreml, onnx, ..."""

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "coreml": ("coreml", ("coremltools",)),
    "onnx": ("onnx", ("onnxruntime",)),
    "openvino": ("openvino", ("openvino",)),
    "trt": ("onnx,trt", ("onnxruntime", "tensorrt|tensorrt_rtx")),
}
"""By format: the extras that install what its export needs beside `compress`, and these packages; `a|b` is either."""


def export(artefact: Path, out: Path, fmt: str, device: Target, *, progress: Callable[..., None]) -> dict[str, Any]:
    """Write `out` in a format of FORMATS for a device; returns the content of edgeprune_export.json.

    Killed, or out of disk, it leaves `OUT.partial`, and the next call with the same arguments goes on from there.
    `progress` is called as progress.Progress says.

    Raises:
        MissingExtraError: a package that the format needs is not installed.
        InputError: `artefact` or `out` is not usable, or the artefact cannot be for this device.
        ParityError: a network does not compute what its checkpoint computes.
        DiskError: the disk is full, or `out` cannot be written.
    """
    if fmt not in FORMATS:
        raise InputError(f"--target: found {fmt!r}, expected one of {', '.join(FORMATS)}")
    accepts.check(artefact, device)
    extra, packages = NEEDS[fmt]
    extras.require(extras.COMPRESS, f"compress,{extra}")
    # Which TensorRT it must be depends on the device: to_trt.py says.
    extras.require(tuple(package for package in packages if "|" not in package), extra)
    module = importlib.import_module(f"edgeprune.export.to_{fmt}")
    with heap.returned():
        written: dict[str, Any] = module.export(artefact, out, device=device, progress=progress)
    return written
