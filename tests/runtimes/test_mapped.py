"""Pages of a mapped file are evicted from memory, and their content stays the same."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeprune.runtimes import memory
from edgeprune.runtimes.mapped import evicting, spans

SIZE = 40_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
@pytest.mark.parametrize("kept", [False, True])
def test_pages_are_given_back_and_read_again(tmp_path: Path, kept: bool) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    os.sync()  # a page that is not on disk yet cannot be dropped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = bytes(mapped)
        full = memory.read()["file_bytes"].bytes
        with evicting(path, kept=kept):
            pass
        assert full - memory.read()["file_bytes"].bytes > 0.8 * SIZE
        assert bytes(mapped) == before


def cached(array: np.ndarray) -> float:
    """Share of an array's pages that the system has in memory, for whatever process."""
    pages = -(-array.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found) == 0
    return sum(page & 1 for page in found) / pages


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_pages_that_nobody_writes_stay_in_the_systems_cache(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    os.sync()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, np.uint8)
        assert array.sum() > 0
        with evicting(path, kept=True):
            pass
        assert cached(array) > 0.9
        part = array[5000:9000]
        assert spans(path, [part, np.zeros(10, np.uint8)]) == [(5000, 9000)]
        del array, part


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_what_was_written_to_a_private_mapping_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(SIZE))
    os.sync()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:3] = b"abc"
        with evicting(path, kept=True):
            pass
        assert mapped[:4] == b"abc\0"
