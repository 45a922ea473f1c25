"""How fast training reads a cache, beside what its disk can do: batches, plain random reads, one pass from end to end.

The system keeps what it has read in memory, so that a second reading measures memory. Where it can be asked to
(`posix_fadvise`: Linux), it forgets the files before each part; how much then really came from the disk is counted by
the system itself, and is in the result. What it leaves out: several readers at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from edgeprune.data.cache import Index, open_pairs
from edgeprune.families import Config, Family

_BLOCK = 1 << 20


def measure(folder: Path, family: Family, config: Config, *, batches: int = 100, size: int = 32) -> dict[str, Any]:
    """Rows of the measurement, units in their names. `_from_disk_bytes` is null where the system does not tell.

    Args:
        family: of the transformer that the samples are for.
        config: its config.
        batches: how many are drawn.
        size: samples in a batch.

    Raises:
        InputError: the folder is no finished cache, or not one for this transformer.
    """
    known = {folder / shard.file: shard.sha256 for shard in Index.load(folder).shards}
    paths, generator = sorted(known), torch.Generator().manual_seed(0)
    pairs = open_pairs(folder, family, config, sha256=known.__getitem__)  # reading it all would fill the memory
    first = pairs.batch(1, 0.0, generator)
    sample_bytes = sum(t.nbytes for t in (first.latents, first.hidden, first.pooled))
    sample_bytes = sample_bytes * pairs.item_bytes // 4
    samples = len(pairs)
    del pairs, first  # what is mapped is not forgotten
    ends = [path.stat().st_size for path in paths]

    def sequential() -> int:
        return sum(_read_all(path) for path in paths)

    def random() -> int:
        files = [os.open(path, os.O_RDONLY) for path in paths]
        try:
            for picked in torch.multinomial(torch.tensor(ends).double(), batches * size, True, generator=generator):
                last = max(1, ends[picked] - sample_bytes)
                offset = int(torch.randint(last, (), generator=generator))
                os.pread(files[picked], sample_bytes, offset)
        finally:
            for file in files:
                os.close(file)
        return batches * size * sample_bytes

    def drawn() -> int:
        found = open_pairs(folder, family, config, sha256=known.__getitem__)
        for _ in range(batches):
            found.batch(size, 0.0, generator)
        return batches * size * sample_bytes

    out: dict[str, Any] = {
        "samples": samples,
        "sample_bytes": sample_bytes,
        "files_bytes": sum(ends),
        "batch_samples": size,
        "cold": hasattr(os, "posix_fadvise"),
    }
    parts: tuple[tuple[str, Callable[[], int]], ...] = (
        ("sequential", sequential),
        ("random", random),
        ("batches", drawn),
    )
    for name, read in parts:
        for path in paths:
            _forget(path)
        before, began = _from_disk(), time.perf_counter()
        count = read()
        seconds, after = time.perf_counter() - began, _from_disk()
        out[f"{name}_samples_per_s"] = round(count / sample_bytes / seconds, 1)
        out[f"{name}_bytes_per_s"] = round(count / seconds)
        out[f"{name}_from_disk_bytes"] = None if before is None or after is None else after - before
    return out


def _read_all(path: Path) -> int:
    count, buffer = 0, bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while found := file.readinto(buffer):
            count += found
    return count


def _forget(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not written yet is not forgotten
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _from_disk() -> int | None:
    """Bytes that this process has made the system read, by its own account."""
    counters = getattr(psutil.Process(), "io_counters", None)  # not on macOS
    return None if counters is None else int(counters().read_bytes)
