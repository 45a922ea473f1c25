"""Runs a compressed model: `load(folder)` returns a `Runtime` that generates images and measures memory.

There is one module per runtime, listed in RUNTIMES. `eager` is the torch reference; the others open an export folder
and import neither torch nor diffusers. LoRAs have to be merged (`edgeprune lora --merge`). Image-to-image is not
supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ != "edgeprune.runtimes":
    raise ImportError(f"import this package as edgeprune.runtimes, not as {__name__}")

import importlib
import shutil
import sys
from collections.abc import Callable

from edgeprune.common import extras
from edgeprune.common.errors import CannotRunError, InputError
from edgeprune.common.files import check_schema, read_json
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.base import plan_runtime as _plan_runtime

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "candidates", "choose", "load", "plan", "prepare", "runnable"]

SCHEMA_VERSION, SCHEMA_APART = 1, 2
"""The versions of edgeprune_export.json: 2 of an export with its modulation apart, which older versions of edgeprune
cannot run. Both are read; an early export of that form has 1."""
_HARDWARE: dict[str, Callable[[], bool]] = {
    "an NVIDIA GPU": lambda: Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None,
    "macOS": lambda: sys.platform == "darwin",
}


@dataclass(frozen=True)
class RuntimeInfo:
    """Facts about a runtime that do not require importing it."""

    extra: str
    """The extra of edgeprune that installs its packages."""
    packages: tuple[str, ...]
    """The packages that it imports."""
    formats: tuple[str, ...]
    """The export formats (`target` in edgeprune_export.json) that it opens; empty if it opens diffusers folders."""
    hardware: str = ""
    """What it requires: `an NVIDIA GPU`, `macOS`, or nothing."""
    place: str = ""
    """Its option of `load` that says where it computes; empty if it has none."""

    def has_hardware(self) -> bool:
        """Return whether this machine has the required hardware."""
        return not self.hardware or _HARDWARE[self.hardware]()

    def installed(self) -> bool:
        """Return whether all of its packages are installed."""
        return not extras.missing(self.packages)

    def require(self) -> None:
        """Check that its packages are installed.

        Raises:
            MissingExtraError: one of them is not installed.
        """
        extras.require(self.packages, self.extra)


_BASE = ("tokenizers", "PIL")
RUNTIMES: dict[str, RuntimeInfo] = {
    "openvino": RuntimeInfo(
        extra="openvino", packages=("openvino", *_BASE), formats=("openvino", "onnx"), place="device"
    ),
    "ort": RuntimeInfo(extra="onnx", packages=("onnxruntime", "onnx", *_BASE), formats=("onnx",), place="provider"),
    # It also needs the TensorRT that built the folder; edgeprune_export.json names it.
    "trt": RuntimeInfo(
        extra="trt", packages=("cuda.bindings.runtime", *_BASE), formats=("trt",), hardware="an NVIDIA GPU"
    ),
    "coreml": RuntimeInfo(
        extra="coreml", packages=("coremltools", *_BASE), formats=("coreml",), hardware="macOS", place="compute_units"
    ),
    "eager": RuntimeInfo(
        extra="compress", packages=("torch", "diffusers", "transformers", *_BASE), formats=(), place="device"
    ),
}
"""By module name. If several open a format, the first installed one is the default."""


def choose(folder: Path, runtime: str | None = None) -> str:
    """Return the runtime for a folder: the one named, or the first installed one that opens it.

    Raises:
        InputError: the folder does not exist, is neither an export nor a pipeline, or the named runtime cannot open it.
        MissingExtraError: no runtime that opens the export is installed.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise InputError(f"runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    fitting = candidates(folder)
    if runtime is None:
        installed = [name for name in fitting if RUNTIMES[name].installed()]
        if not installed:
            RUNTIMES[fitting[-1]].require()
        return installed[0]
    if runtime not in fitting:
        hint = "pass the folder it was exported from" if runtime == "eager" else "export it first (edgeprune export)"
        raise InputError(f"{folder}: found a folder for {', '.join(fitting)}, expected one for {runtime}; {hint}")
    return runtime


def runnable(folder: Path) -> list[str]:
    """Return every runtime that opens this folder and whose packages and hardware are present.

    Raises:
        CannotRunError: none of its runtimes can run here.
        InputError: the folder does not exist, or is neither an export nor a pipeline.
    """
    fitting = candidates(folder)
    usable = [name for name in fitting if RUNTIMES[name].installed() and RUNTIMES[name].has_hardware()]
    if not usable:
        raise CannotRunError(
            f"{folder}: found a folder for {', '.join(fitting)}, none of which runs here; see edgeprune doctor"
        )
    return usable


def candidates(folder: Path) -> list[str]:
    """Return every runtime that opens this folder, the preferred one first, installed or not.

    Raises:
        InputError: the folder does not exist, is neither an export nor a pipeline, or has another schema version.
    """
    if folder.is_file():
        from edgeprune.artefact.convert.opening import refuse_file

        raise refuse_file(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: found no folder, expected an export or a diffusers pipeline")
    manifest = folder / "edgeprune_export.json"
    if manifest.exists():
        record = read_json(manifest)
        version = record.get("schema_version", SCHEMA_VERSION)
        check_schema(manifest, version, (SCHEMA_VERSION, SCHEMA_APART), "export the artefact again")
        target = record.get("target")
        if opening := [name for name, info in RUNTIMES.items() if target in info.formats]:
            return opening
        formats = sorted({f for info in RUNTIMES.values() for f in info.formats})
        raise InputError(f"{manifest}: target: found {target!r}, expected one of {', '.join(formats)}")
    if (folder / "model_index.json").exists():
        return ["eager"]
    raise InputError(
        f"{folder}: found neither edgeprune_export.json (an export) nor model_index.json (a diffusers pipeline)"
    )


def prepare(runtime: str) -> Any:
    """Import a runtime's module and its libraries; `bench` measures its baseline after this.

    Raises:
        InputError: no runtime has this name.
        MissingExtraError: one of its packages is not installed.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    # Not `except ImportError`: a package that is installed but broken should show its own error.
    RUNTIMES[runtime].require()
    return importlib.import_module(f"edgeprune.runtimes.{runtime}")


def load(folder: str | Path, runtime: str | None = None, **options: Any) -> Runtime:
    """Open a model folder for generation.

    Args:
        folder: an export folder, or a diffusers or artefact folder (`eager`).
        runtime: a name in RUNTIMES, or None to choose by the folder and the installed packages.
        **options: passed to the runtime's `open_backend`: `memory`, most bytes of the process (trt, and eager on a GPU:
            of the GPU); `keep_embeddings`, a folder (exports); `threads`; `precision`, `cache_dir` (openvino, ort);
            `device` (openvino); `provider` (ort); `cuda_graph` (trt); `compute_units` (coreml); `dtype`, `device`,
            `variant`, `quantized` (eager).

    Raises:
        InputError: the folder or one of its files is not usable, or the runtime has no such option.
        MissingExtraError: a package that the runtime needs is not installed.
    """
    model = plan(folder, runtime, **options)
    model.backend.open()
    return model


def plan(folder: str | Path, runtime: str | None = None, **options: Any) -> Runtime:
    """Do what `load` does, but open nothing before it runs, so that too little memory can be refused at once.

    Args:
        folder: see `load`.
        runtime: see `load`.
        **options: see `load`.

    Raises:
        InputError: see `load`; see also `Runtime.prepare`.
        MissingExtraError: see `load`.
    """
    folder = Path(folder)
    return _plan_runtime(folder, prepare(choose(folder, runtime)), options)
