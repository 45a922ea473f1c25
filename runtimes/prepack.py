"""ONNX Runtime's prepacked weights on disk: made once, memory-mapped from then on.

ONNX Runtime copies weights into the order its kernels want. Saved, that copy is mapped from its file, so the weights
need next to no memory of the process's own; docs/bench.md has the figures. The cache holds one folder per model, of
about twice the model's size, since the file keeps the weights as they were as well. Making one takes the memory that
it saves later. What it leaves out: providers other than the CPU, and clearing entries of models that are gone.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.files import digest, read_json, write_json

with needs("onnx"):
    import onnxruntime

_MODEL, _DATA, _ENTRY = "model.onnx", "model.onnx.data", "entry.json"


def prepacked(path: Path, cache_dir: Path, config: dict[str, Any], options: Callable[[], Any]) -> Path:
    """The prepacked copy of an ONNX model, made if there is none that fits; open it with optimisation off.

    Args:
        path: the model.
        cache_dir: holds the copies.
        config: what of the options changes the copy.
        options: makes the session's options.

    Raises:
        InputError: the cache cannot be written.
        onnxruntime's errors: the model cannot be opened.
    """
    name = f"{path.parent.name}-{digest(str(path.resolve()))[:12]}"
    entry = cache_dir / f"{name}-{digest(_key(path, config))[:12]}"
    if _whole(entry):
        return entry / _MODEL
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache_dir) as scratch:
            made = Path(scratch) / "entry"
            made.mkdir()
            _room(path, cache_dir)
            _make(path, made, options())
            # Older copies of this model, or this one damaged.
            for old in cache_dir.glob(f"{name}-*"):
                if old != entry or not _whole(old):  # a whole one is another process's, just made
                    shutil.rmtree(old, ignore_errors=True)
            try:
                made.rename(entry)
            except OSError:
                if not _whole(entry):  # else another process was quicker
                    raise
    except OSError as error:
        raise InputError(f"cache_dir: {cache_dir}: {error.strerror or error}, expected a folder to write") from None
    return entry / _MODEL


def _room(path: Path, cache_dir: Path) -> None:
    """A copy takes about twice the model; onnxruntime does not say it clearly if the disk is full."""
    need, free = 2 * sum(size for size, _ in _stamps(path.parent).values()), shutil.disk_usage(cache_dir).free
    if free < need:
        raise InputError(f"cache_dir: {cache_dir}: found {free} bytes free, expected {need}; free some space")


def forget(model: Path) -> None:
    """Remove the copy that holds this model, which could not be opened."""
    shutil.rmtree(model.parent, ignore_errors=True)


def _make(path: Path, folder: Path, options: Any) -> None:
    # A higher level chooses layouts that a saved model cannot keep.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / _MODEL)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _DATA)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    write_json(folder / _ENTRY, _stamps(folder))


def _stamps(folder: Path, pattern: str = "model.onnx*") -> dict[str, list[int]]:
    found = ((p, p.stat()) for p in sorted(folder.glob(pattern)))
    return {p.name: [s.st_size, s.st_mtime_ns] for p, s in found}


def _whole(entry: Path) -> bool:
    """Whether its files are those that were written."""
    try:
        return read_json(entry / _ENTRY) == _stamps(entry)
    except InputError:
        return False


def _key(path: Path, config: dict[str, Any]) -> list[Any]:
    """What the copy depends on: the model's files, the library, its options, and the processor its kernels are for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kinds = sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))})
    return [_stamps(path.parent), onnxruntime.__version__, config, platform.machine(), platform.processor(), kinds]
