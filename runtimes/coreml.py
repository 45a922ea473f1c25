"""Runs Core ML packages on a Mac, with numpy inputs and outputs.

    load("out", compute_units="cpu_and_ne")

Needs coremltools and macOS 15, not torch. A package is compiled once and loaded, which specialises it for the compute
units; macOS caches that. The chunks of a network run one after the other (coreml_chain.py); where memory is short, only
some are open at a time. The compiled model is not kept after the process ends, and only the exported image size works.
On iPhone and iPad an app runs the packages (docs/coreml.md).
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.memory import resident
from edgeprune.common.pieces import RESERVE, Needs
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.coreml_chain import Chain, Package
from edgeprune.runtimes.memory import Reading
from edgeprune.runtimes.networks import NetworkBackend, Shapes, room_here

# Outside macOS it cannot predict, and it would import torch if that is installed.
with needs("coreml"):
    coremltools: Any = importlib.import_module("coremltools") if sys.platform == "darwin" else None

COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
_INT32 = 0x20000 | 32  # ArrayFeatureType.INT32


def described(path: Path) -> Package:
    """Read what a package takes and returns.

    Raises:
        InputError: it is damaged.
    """
    try:
        description = coremltools.utils.load_spec(str(path)).description
    except Exception as error:  # coremltools raises plain Exception
        raise _unusable(path, error) from None
    return Package(
        path,
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        {v.name: shapes(v.type.multiArrayType) for v in description.input},
        [v.name for v in description.output],
    )


def shapes(array: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Return the shapes that a package's input takes and whether it holds integers, from its ArrayFeatureType."""
    listed = [tuple(s.shape) for s in array.enumeratedShapes.shapes] or [tuple(array.shape)]
    return listed, array.dataType == _INT32


def chain_of(folder: Path) -> Chain:
    """Return the packages of a network's folder; none is opened.

    Raises:
        InputError: the folder has no package, one is damaged, or one does not fit those before it.
    """
    whole = folder / "model.mlpackage"
    chunks = sorted(folder.glob("chunk_*.mlpackage"), key=lambda path: int(path.stem.removeprefix("chunk_")))
    paths = [whole] if whole.exists() else chunks
    if not paths:
        raise InputError(f"{whole}: neither it nor chunk_1.mlpackage exists, expected a Core ML package; export again")
    return Chain([described(path) for path in paths])


class CompiledPackage:
    """A package compiled and loaded by Core ML, which frees it when nothing refers to it.

    Attributes:
        compile_s, specialise_s: seconds it took to compile, unless it was, and to load.
    """

    def __init__(self, path: Path, compiled: Path, units: str) -> None:
        began = time.perf_counter()
        if not compiled.exists():
            coremltools.models.utils.compile_model(str(path), str(compiled))
        self.compile_s = time.perf_counter() - began
        began = time.perf_counter()
        self._model: Any = coremltools.models.CompiledMLModel(str(compiled), coremltools.ComputeUnit[units.upper()])
        self.specialise_s = time.perf_counter() - began

    def predict(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs by name."""
        outputs: dict[str, Any] = self._model.predict(arrays)
        return outputs


Open = Callable[[Path], Any]
"""Opens one .mlpackage as a CompiledPackage."""


class CoremlNetwork:
    """One network, in one package or in chunks; maps Core ML's errors to InputError.

    Args:
        folder: the network's.
        provider: the compute units.
        open_package: opens a package.
        limit: most bytes of the process. As many of the first chunks as fit stay open; the others are opened, run and
            closed one after the other at each call. None opens all now.

    Raises:
        InputError: the folder has no package, or Core ML rejects one.
    """

    def __init__(self, folder: Path, provider: str, open_package: Open, limit: int | None = None) -> None:
        self._chain = chain_of(folder)
        self.provider, self.why, self._folder = provider, f"compute_units={provider}", folder
        self._open_package, self._limit = open_package, limit
        self._kept: dict[Path, Any] = {}
        """The packages that are open between two calls."""
        self._rows, self._at_once, self._stay = 0, 1, 0
        self._closed = False
        self.times = {"compile_s": 0.0, "specialise_s": 0.0}
        """Seconds to compile and to load, summed over all packages and each time that one was opened."""
        if limit is None:
            self._stay = len(self._chain.packages)
            for package in self._chain.packages:
                self._opened(package, stays=True)

    def largest_batch(self, name: str) -> int:
        """Return the most rows that an input takes; an export's packages take every number from 1 to it."""
        allowed, _ = self._chain.packages[0].inputs[name]
        return int(max(shape[0] for shape in allowed))

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32; runs the chunks one after the other."""
        (outputs,) = self.many([arrays])
        return outputs

    def many(self, feeds: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Array]]:
        """Yield the outputs by name, float32, for each set of inputs; all that fit go through a chunk together."""
        if self._closed:
            raise InputError("the runtime is closed; load the folder again")
        for feed in feeds:
            self._check(feed)
        size = self._plan(len(feeds))
        for start in range(0, len(feeds), size):
            yield from self._through(feeds[start : start + size])

    def _check(self, arrays: Mapping[str, Any]) -> None:
        first = self._chain.packages[0].inputs
        if missing := sorted(set(first) - set(arrays)):
            raise InputError(f"{self._folder}: inputs: the package also needs {missing}, found {sorted(arrays)}")
        for name, (allowed, _) in first.items():
            if (found := np.shape(arrays[name])) not in allowed:
                raise InputError(
                    f"{self._folder}: {name}: found shape {found}, expected one of {allowed}: a package has one size; "
                    "set height, width and max_sequence_length in generation.json and export again"
                )

    def _plan(self, rows: int) -> int:
        """Decide for so many sets of inputs which packages stay open; return how many sets go together."""
        if self._limit is None:
            return rows
        if rows > self._rows:
            self._kept.clear()
            room = self._limit - RESERVE - resident()
            self._at_once = self._chain.at_once(room, rows)
            self._stay, self._rows = self._chain.kept(room, self._at_once), rows
        return self._at_once

    def _through(self, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        """Carry sets of inputs through one package after the other."""
        first = self._chain.packages[0]
        states = [first.feed(feed) for feed in feeds]
        for index, package in enumerate(self._chain.packages):
            opened = self._opened(package, stays=index < self._stay)
            later = self._chain.later(index)
            for state in states:
                state.update(self._predicted(opened, package.feed(state)))
                for name in state.keys() - later:
                    del state[name]
            del opened  # before the next is opened
        # Core ML allows no dot in a name.
        return [{re.sub(r"^hidden_states_(?=\d)", "hidden_states.", n): v for n, v in s.items()} for s in states]

    def _opened(self, package: Package, *, stays: bool) -> Any:
        """Return a package, opened unless it is."""
        if package.path in self._kept:
            return self._kept[package.path]
        try:
            opened = self._open_package(package.path)
        except Exception as error:  # coremltools raises plain Exception
            raise _unusable(package.path, error) from None
        for kind in self.times:
            self.times[kind] += getattr(opened, kind)
        if stays:
            self._kept[package.path] = opened
        return opened

    def _predicted(self, opened: Any, feed: dict[str, Array]) -> dict[str, Array]:
        try:
            outputs = opened.predict(feed)
        except (RuntimeError, ValueError, TypeError) as error:
            sizes = {name: array.shape for name, array in feed.items()}
            raise InputError(f"{self._folder}: Core ML failed: {_line(error)}; inputs were {sizes}") from None
        return {name: np.asarray(value, np.float32) for name, value in outputs.items()}

    def close(self) -> None:
        """Drop the models; Core ML then frees their memory."""
        self._closed = True
        self._kept.clear()


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: Core ML cannot open it: {_line(error)}; export again")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True)
class CoremlEngine:
    """Opens the networks of an export."""

    opener: Callable[[Path, int | None], CoremlNetwork]
    name: str = "coreml"
    activations: str = "fp16"
    text_activations: str = "fp16"
    counts_values: bool = True
    """Those that pass from one package to the next."""

    def open(self, folder: Path, limit: int | None) -> CoremlNetwork:
        """Open a network: whole, or within a limit."""
        return self.opener(folder, limit)

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes that a network takes; its packages have one size. What is inside one is not counted."""
        return chain_of(folder).needs()

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has now, and may have at most."""
        return room_here()

    def memory(self) -> dict[str, Reading]:
        """Return nothing: the process has the memory."""
        return {}


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
        memory: most bytes of the process; None takes most of what is free. Networks that do not fit together are open
            one after the other, and chunks that do not fit are opened and closed at each step. Compiled packages are
            kept until the runtime closes.
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

    def open_network(path: Path, limit: int | None) -> CoremlNetwork:
        network = CoremlNetwork(path, compute_units, open_package, limit)
        times[path.name] = network.times
        return network

    engine = CoremlEngine(open_network)
    backend = NetworkBackend(engine, folder, settings, memory=memory, keep_embeddings=keep_embeddings)
    backend.times = times
    return backend
