"""Runs a compressed model: `load(folder)` gives a `Runtime` that generates images, steps, and measures memory.

One module per runtime, listed in RUNTIMES. `eager` is the torch reference; the others open an export folder and
need neither torch nor diffusers. What it leaves out: batching servers, LoRA, image-to-image.
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
from edgeprune.runtimes.base import open_runtime as _open_runtime

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "candidates", "choose", "load", "prepare", "runnable"]

SCHEMA_VERSION = 1
"""Of edgeprune_export.json."""
_HARDWARE: dict[str, Callable[[], bool]] = {
    "an NVIDIA GPU": lambda: Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None,
    "macOS": lambda: sys.platform == "darwin",
}


@dataclass(frozen=True)
class RuntimeInfo:
    """What is known of a runtime without importing it."""

    extra: str
    """The extra of edgeprune that installs it."""
    packages: tuple[str, ...]
    """What it imports."""
    formats: tuple[str, ...]
    """Export formats (`target` in edgeprune_export.json) that it opens; none for a diffusers folder."""
    hardware: str = ""
    """What it cannot run without: `an NVIDIA GPU`, `macOS`, or nothing."""

    def has_hardware(self) -> bool:
        """Whether what it cannot run without is there."""
        return not self.hardware or _HARDWARE[self.hardware]()

    def installed(self) -> bool:
        """Whether all of its packages are."""
        return not extras.missing(self.packages)

    def require(self) -> None:
        """Refuse to go on without its packages.

        Raises:
            MissingExtraError: one of them is not installed.
        """
        extras.require(self.packages, self.extra)


_BASE = ("tokenizers", "PIL")
RUNTIMES: dict[str, RuntimeInfo] = {
    "openvino": RuntimeInfo("openvino", ("openvino", *_BASE), ("openvino", "onnx")),
    "ort": RuntimeInfo("onnx", ("onnxruntime", *_BASE), ("onnx",)),
    # And the TensorRT that built the folder, which it names.
    "trt": RuntimeInfo("trt", ("cuda.bindings.runtime", *_BASE), ("trt",), "an NVIDIA GPU"),
    "coreml": RuntimeInfo("coreml", ("coremltools", *_BASE), ("coreml",), "macOS"),
    "eager": RuntimeInfo("compress", ("torch", "diffusers", "transformers", *_BASE), ()),
}
"""By name, which is also the module's; of several that open a format, the first installed one is taken."""


def choose(folder: Path, runtime: str | None = None) -> str:
    """The runtime for a folder: the one named, or of an export the first installed one, else `eager`.

    Raises:
        InputError: no such folder, neither an export nor a pipeline, or not one that the named runtime opens.
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
        hint = "give the folder it was exported from" if runtime == "eager" else "export it first (edgeprune export)"
        raise InputError(f"{folder}: found a folder for {', '.join(fitting)}, expected one for {runtime}; {hint}")
    return runtime


def runnable(folder: Path) -> list[str]:
    """Every runtime that opens this folder and whose packages and hardware are here.

    Raises:
        CannotRunError: none of its runtimes can run here.
        InputError: no such folder, or neither an export nor a pipeline.
    """
    fitting = candidates(folder)
    found = [name for name in fitting if RUNTIMES[name].installed() and RUNTIMES[name].has_hardware()]
    if not found:
        raise CannotRunError(
            f"{folder}: found a folder for {', '.join(fitting)}, none of which runs here; see edgeprune doctor"
        )
    return found


def candidates(folder: Path) -> list[str]:
    """Every runtime that opens this folder, the preferred one first, installed or not.

    Raises:
        InputError: there is no such folder, it is neither an export nor a pipeline, or another edgeprune exported it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: found no folder, expected an export or a diffusers pipeline")
    manifest = folder / "edgeprune_export.json"
    if manifest.exists():
        record = read_json(manifest)
        check_schema(
            manifest, record.get("schema_version", SCHEMA_VERSION), SCHEMA_VERSION, "export the artefact again"
        )
        target = record.get("target")
        if found := [name for name, info in RUNTIMES.items() if target in info.formats]:
            return found
        known = sorted({f for info in RUNTIMES.values() for f in info.formats})
        raise InputError(f"{manifest}: target: found {target!r}, expected one of {', '.join(known)}")
    if (folder / "model_index.json").exists():
        return ["eager"]
    raise InputError(
        f"{folder}: found neither edgeprune_export.json (an export) nor model_index.json (a diffusers pipeline)"
    )


def prepare(runtime: str) -> Any:
    """Import a runtime's module and its libraries, nothing else; `bench` measures its baseline after this.

    Raises:
        InputError: no runtime has this name.
        MissingExtraError: one of its packages is not installed.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    # Not `except ImportError`: a package that is there but broken should show its own error.
    RUNTIMES[runtime].require()
    return importlib.import_module(f"edgeprune.runtimes.{runtime}")


def load(folder: str | Path, runtime: str | None = None, **options: Any) -> Runtime:
    """Open a model folder for generation.

    Args:
        folder: an export folder (`openvino`, `ort`), or a diffusers or artefact folder (`eager`).
        runtime: a name of RUNTIMES, or None to choose by what the folder is and what is installed.
        **options: passed to the runtime's `open_backend`: `threads`; `low_memory` (exports); `cache_dir`
            (openvino, ort); `device`, `dynamic_quantization` (openvino); `provider`, `accuracy_level` (ort);
            `cuda_graph` (trt);
            `compute_units` (coreml); `dtype`, `device` (eager: fp32, bf16; cuda, cpu).

    Raises:
        InputError: the folder or one of its files is not usable, or the runtime has no such option.
        MissingExtraError: a package that the runtime needs is not installed.
    """
    folder = Path(folder)
    return _open_runtime(folder, prepare(choose(folder, runtime)), options)
