"""Runs Core ML packages on a Mac, with numpy inputs and outputs.

    load("out", compute_units="cpu_and_ne")

Needs coremltools and macOS 15, not torch. A package is compiled once and loaded, which specialises it for the compute
units; macOS caches that. The chunks of a transformer run one after the other. The compiled model is not kept after the
process ends, and only the exported image size works. On iPhone and iPad an app runs the packages (docs/coreml.md).
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.networks import NetworkBackend, WholeEngine

# Outside macOS it cannot predict, and it would import torch if that is installed.
with needs("coreml"):
    coremltools: Any = importlib.import_module("coremltools") if sys.platform == "darwin" else None

COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
_INT32 = 0x20000 | 32  # ArrayFeatureType.INT32


class CompiledPackage:
    """A package compiled and loaded by Core ML.

    Attributes:
        inputs: by name, the shapes that it takes and whether the values are integers.
        outputs: their names.
        compile_s, specialise_s: seconds it took to compile and to load.
    """

    def __init__(self, path: Path, compiled: Path, units: str) -> None:
        began = time.perf_counter()
        if not compiled.exists():
            coremltools.models.utils.compile_model(str(path), str(compiled))
        self.compile_s = time.perf_counter() - began
        description = coremltools.utils.load_spec(str(path)).description
        self.inputs = {v.name: shapes(v.type.multiArrayType) for v in description.input}
        self.outputs = [v.name for v in description.output]
        began = time.perf_counter()
        self._model: Any = coremltools.models.CompiledMLModel(str(compiled), coremltools.ComputeUnit[units.upper()])
        self.specialise_s = time.perf_counter() - began

    def predict(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs by name."""
        outputs: dict[str, Any] = self._model.predict(arrays)
        return outputs


def shapes(array: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Return the shapes that a package's input takes and whether it holds integers, from its ArrayFeatureType."""
    listed = [tuple(s.shape) for s in array.enumeratedShapes.shapes] or [tuple(array.shape)]
    return listed, array.dataType == _INT32


Open = Callable[[Path], Any]
"""Opens one .mlpackage as a CompiledPackage."""


class CoremlNetwork:
    """One network, in one package or in chunks; maps Core ML's errors to InputError.

    Raises:
        InputError: the folder has no package, or Core ML rejects one.
    """

    def __init__(self, folder: Path, provider: str, open_package: Open) -> None:
        whole = folder / "model.mlpackage"
        chunks = sorted(folder.glob("chunk_*.mlpackage"), key=lambda path: int(path.stem.removeprefix("chunk_")))
        paths = [whole] if whole.exists() else chunks
        if not paths:
            raise InputError(
                f"{whole}: neither it nor chunk_1.mlpackage exists, expected a Core ML package; export again"
            )
        self.provider, self.why, self._folder = provider, f"compute_units={provider}", folder
        self._packages: Sequence[Any] = [_open(path, open_package) for path in paths]

    def largest_batch(self, name: str) -> int:
        """Return the most rows that an input takes; an export's packages take every number from 1 to it."""
        allowed, _ = self._packages[0].inputs[name]
        return int(max(shape[0] for shape in allowed))

    @property
    def times(self) -> dict[str, float]:
        """Seconds to compile and to specialise, summed over all chunks."""
        return {kind: sum(getattr(p, kind) for p in self._packages) for kind in ("compile_s", "specialise_s")}

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32; runs the chunks one after the other."""
        if not self._packages:
            raise InputError("the runtime is closed; load the folder again")
        first = self._packages[0].inputs
        if missing := sorted(set(first) - set(arrays)):
            raise InputError(f"{self._folder}: inputs: the package also needs {missing}, found {sorted(arrays)}")
        for name, (allowed, _) in first.items():
            if (found := np.shape(arrays[name])) not in allowed:
                raise InputError(
                    f"{self._folder}: {name}: found shape {found}, expected one of {allowed}: a package has one size; "
                    "set height, width and max_sequence_length in generation.json and export again"
                )
        outputs: dict[str, Any] = {}
        for package in self._packages:
            feed = {
                name: np.asarray(arrays[name], np.int32 if integer else np.float32)
                for name, (_, integer) in package.inputs.items()
            }
            try:
                outputs = package.predict(feed)
            except (RuntimeError, ValueError, TypeError) as error:
                sizes = {name: array.shape for name, array in feed.items()}
                raise InputError(f"{self._folder}: Core ML failed: {_line(error)}; inputs were {sizes}") from None
            arrays = arrays | outputs
        # Core ML allows no dot in a name.
        return {
            re.sub(r"^hidden_states_(?=\d)", "hidden_states.", n): np.asarray(v, np.float32) for n, v in outputs.items()
        }

    def close(self) -> None:
        """Drop the models; Core ML then frees their memory."""
        self._packages = []


def _open(path: Path, open_package: Open) -> Any:
    try:
        return open_package(path)
    except Exception as error:  # coremltools raises plain Exception
        raise InputError(f"{path}: Core ML cannot open it: {_line(error)}; export again") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    compute_units: str = "all",
    memory: int | None = None,
    keep_embeddings: str | Path | None = None,
) -> NetworkBackend:
    """Open an export folder.

    Args:
        folder: an export of format coreml.
        settings: that folder's settings.
        compute_units: one of COMPUTE_UNITS; Core ML chooses among these for each operation.
        memory: most bytes of the process; None takes most of what is free. Networks whose files do not fit together
            are open one after the other; compiled packages are kept for the next image.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.

    Raises:
        InputError: this is not a Mac, the compute units are unknown, or a package is missing or damaged.
    """
    if compute_units not in COMPUTE_UNITS:
        raise InputError(f"compute_units: found {compute_units!r}, expected one of {', '.join(COMPUTE_UNITS)}")
    if coremltools is None:
        raise InputError(
            f"{folder}: found {sys.platform}, expected macOS 15 or newer: Core ML runs on Apple devices only"
        )
    compiled = Path(tempfile.mkdtemp(prefix="edgeprune-"))

    def open_package(path: Path) -> CompiledPackage:
        return CompiledPackage(path, compiled / f"{path.parent.name}-{path.stem}.mlmodelc", compute_units)

    weakref.finalize(open_package, shutil.rmtree, compiled, ignore_errors=True)
    times: dict[str, dict[str, float]] = {}

    def open_network(path: Path) -> CoremlNetwork:
        network = CoremlNetwork(path, compute_units, open_package)
        times[path.name] = network.times
        return network

    engine = WholeEngine("coreml", open_network, activations="fp16")
    backend = NetworkBackend(engine, folder, settings, memory=memory, keep_embeddings=keep_embeddings)
    backend.times = times
    return backend
