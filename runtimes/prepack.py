"""Keeps ONNX Runtime's prepacked weights on disk: created once, memory-mapped from then on.

ONNX Runtime copies weights into the layout of its kernels. If that copy is saved, it can be mapped from its file, and
the weights need almost no private memory; docs/bench.md has the figures. The cache holds one folder per model, of about
twice the model's size because it also contains the original weights. Creating it needs the memory that it saves later.
It works only for the CPU provider. Entries of models that were deleted are not removed.
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
    """Return the prepacked copy of an ONNX model, created if the cache has none; open it with optimisation off.

    Args:
        path: the model.
        cache_dir: holds the copies.
        config: the options that change the copy.
        options: creates session options.

    Raises:
        InputError: the cache cannot be written.
        onnxruntime's errors: the model cannot be opened.
    """
    name = f"{path.parent.name}-{digest(str(path.resolve()))[:12]}"
    entry = cache_dir / f"{name}-{digest(_key(path, config))[:12]}"
    if _is_intact(entry):
        return entry / _MODEL
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache_dir) as scratch:
            new = Path(scratch) / "entry"
            new.mkdir()
            _room(path, cache_dir)
            _make(path, new, options())
            # Remove older copies of this model, and a damaged one of this version.
            for old in cache_dir.glob(f"{name}-*"):
                if old != entry or not _is_intact(old):  # another process has just finished it
                    shutil.rmtree(old, ignore_errors=True)
            try:
                new.rename(entry)
            except OSError:
                if not _is_intact(entry):  # otherwise another process was faster
                    raise
    except OSError as error:
        raise InputError(f"cache_dir: {cache_dir}: {error.strerror or error}, expected a writable folder") from None
    return entry / _MODEL


def _room(path: Path, cache_dir: Path) -> None:
    """Check for free space of twice the model: onnxruntime has no clear error for a full disk."""
    need, free = 2 * sum(size for size, _ in _stamps(path.parent).values()), shutil.disk_usage(cache_dir).free
    if free < need:
        raise InputError(f"cache_dir: {cache_dir}: found {free} free bytes, expected {need}; free some space")


def forget(model: Path) -> None:
    """Remove the cache entry of this copy, which could not be opened."""
    shutil.rmtree(model.parent, ignore_errors=True)


def _make(path: Path, folder: Path, options: Any) -> None:
    # A higher level chooses layouts that cannot be saved.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / _MODEL)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _DATA)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    write_json(folder / _ENTRY, _stamps(folder))


def _stamps(folder: Path, pattern: str = "model.onnx*") -> dict[str, list[int]]:
    """Return size and time of a model's files, by name."""
    stats = ((p, p.stat()) for p in sorted(folder.glob(pattern)))
    return {p.name: [s.st_size, s.st_mtime_ns] for p, s in stats}


def _is_intact(entry: Path) -> bool:
    """Return whether an entry's files are unchanged."""
    try:
        return read_json(entry / _ENTRY) == _stamps(entry)
    except InputError:
        return False


def _key(path: Path, config: dict[str, Any]) -> list[Any]:
    """Return what the copy depends on: the model's files, the library, the options and the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kinds = sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))})
    return [_stamps(path.parent), onnxruntime.__version__, config, platform.machine(), platform.processor(), kinds]
