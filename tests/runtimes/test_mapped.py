"""Pages of a mapped file are evicted from memory, and their content stays the same."""

import mmap
import os
import sys
from pathlib import Path

import pytest

from edgeprune.runtimes import memory
from edgeprune.runtimes.mapped import evicting

SIZE = 40_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    os.sync()  # a page that is not on disk yet cannot be dropped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = bytes(mapped)
        full = memory.read()["file_bytes"].bytes
        with evicting(path):
            pass
        assert full - memory.read()["file_bytes"].bytes > 0.8 * SIZE
        assert bytes(mapped) == before
