"""Write a folder of weights in diffusers' layout, shard by shard; an interrupted run resumes after its last shard.

A folder holds one `diffusion_pytorch_model.safetensors`, or shards and their index. weights.py reads it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.files import UNFINISHED, read_json, write_json
from edgeprune.common.progress import Progress
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.residency.weights import FILE

SHARD_BYTES = 200_000_000
"""A shard closes once it holds this much: one block of a full-size model, or all of a small one."""
SHOW_BYTES_FROM = 10**9
"""Stages smaller than this show no byte counts: they finish too quickly."""


class ShardWriter:
    """Write the shards of one folder, each atomically; a new writer with the same inputs continues after the last one.

        writer = ShardWriter(folder, groups, inputs)
        for i in range(len(groups)):
            if not writer.has(i):
                writer.put(i, {name: ... for name in groups[i]})
        writer.finish()

    Args:
        folder: the folder to write; shards of an earlier run stay only if its `inputs` are the same.
        groups: the names of each shard's tensors.
        inputs: digest of everything that the tensors depend on.
        file: the name of a single shard; several have numbers in it.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]], inputs: str, file: str = FILE) -> None:
        self.folder, self.groups, self._file = folder, [list(g) for g in groups], file
        self._adding, self._parts = -1, Tensors()
        if not has_mark(folder, inputs, len(groups)):
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / UNFINISHED, {"inputs": inputs, "shards": len(groups)})

    def path(self, index: int) -> Path:
        """Return a shard's path."""
        count = len(self.groups)
        stem, dot, kind = self._file.partition(".")
        return self.folder / (self._file if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}{dot}{kind}")

    def has(self, index: int) -> bool:
        """Return True if a shard exists. Renaming it from a temporary name makes it complete or absent."""
        return self.path(index).is_file()

    def put(self, index: int, tensors: Tensors) -> None:
        """Write a shard.

        Raises:
            DiskError: the disk is full; earlier shards stay.
        """
        if sorted(tensors) != sorted(self.groups[index]):
            raise AssertionError(f"shard {index}: the tensors are not those planned for it")
        save_tensors(self.path(index), tensors, {"format": "pt"}, hashed=True)

    def shard_of(self, name: str) -> int:
        """Return the index of the shard that holds a tensor."""
        return next(index for index, names in enumerate(self.groups) if name in names)

    def add(self, tensors: Tensors) -> None:
        """Take some of a shard's tensors. It is written with the last ones, unless those of another come between.

        Raises:
            DiskError: see `put`.
        """
        index = self.shard_of(next(iter(tensors)))
        self._parts = tensors if index != self._adding else self._parts | tensors
        self._adding = index
        if len(self._parts) == len(self.groups[index]):
            self.put(index, self._parts)
            self._parts = {}

    def finish(self) -> None:
        """Write the index, so that diffusers and `Weights` can read the folder. The mark stays."""
        if len(self.groups) > 1:
            files = {name: self.path(i).name for i, group in enumerate(self.groups) for name in group}
            size = sum(self.path(i).stat().st_size for i in range(len(self.groups)))
            write_json(
                self.folder / f"{self._file}.index.json", {"metadata": {"total_size": size}, "weight_map": files}
            )


def has_mark(folder: Path, inputs: str, count: int) -> bool:
    """Return True if a folder's mark names these inputs and this number of shards, finished or not."""
    return mark_of(folder) == {"inputs": inputs, "shards": count}


def mark_of(folder: Path) -> dict[str, Any]:
    """Return what a folder's mark says; empty without one, and if it is damaged."""
    try:
        return read_json(folder / UNFINISHED)
    except InputError:
        return {}


def group_into_shards(sizes: Sequence[int]) -> list[list[int]]:
    """Group parts of these sizes in bytes, in order: a shard closes once it holds SHARD_BYTES. Returns indices."""
    out: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if filled >= SHARD_BYTES:
            out.append([])
            filled = 0
        out[-1].append(index)
        filled += size
    return out


class Speed:
    """Report the progress of a stage whose shards have known sizes, such as `3.10 of 12.70 GB, 410 MB/s`.

    Args:
        what: name of the stage.
        sizes: bytes of each shard.
        progress: called with the stage, shards done, all shards, and the note.
    """

    def __init__(self, what: str, sizes: Sequence[int], progress: Progress) -> None:
        self._what, self._sizes, self._progress = what, sizes, progress
        self._began, self._resumed_bytes = time.monotonic(), 0

    def done(self, count: int, *, found: bool = False) -> None:
        """Report that the first `count` shards exist; `found` if an earlier run wrote the last of them."""
        done = sum(self._sizes[:count])
        self._resumed_bytes = done if found else self._resumed_bytes
        speed = (done - self._resumed_bytes) / max(1e-6, time.monotonic() - self._began)
        total = sum(self._sizes)
        written = f", {speed / 1e6:,.0f} MB/s" if speed else ""  # none where all was there
        note = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB{written}" if total >= SHOW_BYTES_FROM else ""
        self._progress(self._what, count, len(self._sizes), note)
