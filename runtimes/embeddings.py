"""Keeps encoded prompts on disk, so that a prompt that was encoded once needs no text encoder again.

An entry is named by the text encoders' own files and the prompt's tokens: another export with the same encoders finds
it, and one with other encoders does not. Entries are never removed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, read_json

Row = tuple[NDArray[np.float32], NDArray[np.float32]]


class KeptEmbeddings:
    """Encoded prompts in a folder.

    Args:
        folder: holds them; it is made.
        export: the export whose text encoders encode.
        encoders: their names.
        context: what else the embeddings depend on.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, export: Path, encoders: Sequence[str], context: Sequence[object]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"keep_embeddings: {folder}: {error.strerror}, expected a writable folder") from None
        self._folder = folder
        self._identity = [*context, *(_identity(export, name) for name in encoders)]

    def path(self, tokens: Sequence[Sequence[int]]) -> Path:
        """Return where a prompt is kept, by its token ids for each encoder."""
        return self._folder / f"{digest([self._identity, [list(map(int, ids)) for ids in tokens]])[:32]}.safetensors"

    def read(self, path: Path) -> Row | None:
        """Return a prompt's hidden (1, M, K) and pooled (1, P) text, or None if it is not kept, or damaged."""
        try:
            arrays = load_file(path)
            return arrays["hidden"], arrays["pooled"]
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, path: Path, row: Row) -> None:
        """Keep a prompt; warns if the folder cannot be written."""
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file({"hidden": row[0], "pooled": row[1]}, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            warnings.warn(f"keep_embeddings: {path.parent}: {error}; the prompt is not kept", stacklevel=2)


def _identity(export: Path, name: str) -> dict[str, object]:
    """Return what tells a network from others: the hashes of its files, or of older exports sizes and times."""
    hashes = read_json(export / "edgeprune_export.json").get("files")
    found = {k: v for k, v in hashes.items() if k.startswith(f"{name}/")} if isinstance(hashes, dict) else {}
    if found:
        return found
    stats = ((path, path.stat()) for path in sorted((export / name).iterdir()))
    return {f"{name}/{path.name}": [stat.st_size, stat.st_mtime_ns] for path, stat in stats}
