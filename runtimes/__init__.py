"""Runs a compressed model: `load(folder)` gives a `Runtime` that generates images, steps, and measures memory.

Two runtimes so far: `ort` (an export folder, ONNX Runtime; needs neither torch nor diffusers) and `eager` (a
diffusers or artefact folder in torch, the reference). What it leaves out: batching servers, LoRA, image-to-image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

if __name__ != "edgeprune.runtimes":
    raise ImportError(f"import this package as edgeprune.runtimes, not as {__name__}")

import importlib
import importlib.util

from edgeprune.errors import InputError, MissingExtraError
from edgeprune.files import read_json
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.base import open_runtime as _open_runtime

__all__ = ["RUNTIMES", "Runtime", "choose", "load", "prepare"]

RUNTIMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ort": ("onnx", ("onnxruntime", "tokenizers", "PIL")),
    "eager": ("compress", ("torch", "diffusers", "transformers", "PIL")),
}
"""Runtime name to the extra that installs it and the packages it imports."""


def choose(folder: Path) -> str:
    """The runtime for a folder: `ort` for an ONNX export, `eager` for a diffusers or artefact folder.

    Raises:
        InputError: there is no such folder, or it is neither.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: found no folder, expected an export or a diffusers pipeline")
    manifest = folder / "edgeprune_export.json"
    if manifest.exists():
        target = read_json(manifest).get("target")
        if target != "onnx":
            raise InputError(f"{manifest}: target: found {target!r}, expected 'onnx'")
        return "ort"
    if (folder / "model_index.json").exists():
        return "eager"
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
    extra, packages = RUNTIMES[runtime]
    for package in packages:
        # Not `except ImportError`: a package that is there but broken should show its own error.
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError({"PIL": "pillow"}.get(package, package), extra)
    return importlib.import_module(f"edgeprune.runtimes.{runtime}")


def load(folder: str | Path, runtime: str | None = None, **options: Any) -> Runtime:
    """Open a model folder for generation.

    Args:
        folder: an export folder (`ort`), or a diffusers or artefact folder (`eager`).
        runtime: `ort`, `eager`, or None to choose by what the folder is.
        **options: passed to the runtime: `threads` (both), `accuracy_level` (ort), `dtype` (eager: fp32, bf16).

    Raises:
        InputError: the folder or one of its files is not usable.
        MissingExtraError: a package that the runtime needs is not installed.
    """
    folder = Path(folder)
    found = choose(folder)
    if runtime is not None and runtime != found:
        if runtime in RUNTIMES:
            hint = "export it first (edgeprune export)" if runtime == "ort" else "give the folder it was exported from"
            raise InputError(f"{folder}: found a folder for runtime {found!r}, expected one for {runtime!r}; {hint}")
        raise InputError(f"runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    return _open_runtime(folder, prepare(found), options)
