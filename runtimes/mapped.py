"""Evicts the pages of a memory-mapped weight file while a vendor repacks it, so weights are not in memory twice.

OpenVINO maps its `.bin`, copies every weight into its own layout, and keeps the mapping: the peak is the sum of both.
MADV_PAGEOUT tells the kernel that the pages are not needed now. It never loses data: a page that is read again comes
from the file. Where the caller keeps a mapping that cannot be written, MADV_DONTNEED takes the pages from the process
and leaves them in the system's cache while there is room: pieces that are opened at each step need not be read from the
disk again. If such a mapping went away meanwhile, other memory at its addresses would be lost. They need Linux, the
first 5.4 or later; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

_DONTNEED, _PAGEOUT = 4, 21
"""MADV_DONTNEED and MADV_PAGEOUT of <linux/mman.h>."""
EVERY_S = 0.2


@contextmanager
def evicting(path: Path, *, kept: bool = False) -> Iterator[None]:
    """Evict the mapped pages of a file repeatedly inside this context, and once at its end.

    Args:
        path: the file.
        kept: nothing unmaps it inside this context, because the caller holds what maps it.
    """
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(EVERY_S):
            evict(path, kept=kept)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        evict(path, kept=kept)


def evict(path: Path, *, kept: bool = False) -> None:
    """Tell the kernel that no mapped page of this file is needed now; for `kept` see `evicting`."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for first, last, rights, _ in _mappings(path):
        # An older kernel refuses PAGEOUT, or the range was unmapped meanwhile: the pages stay, which is harmless.
        madvise(first, last - first, _DONTNEED if kept and "w" not in rights else _PAGEOUT)


def spans(path: Path, arrays: Iterable[NDArray[Any]]) -> list[tuple[int, int]]:
    """Return begin and end in a mapped file of arrays that lie in it; others are left out."""
    if sys.platform != "linux":
        return []
    mappings, out = _mappings(path), []
    for array in arrays:
        address = array.ctypes.data
        out += [
            (offset + address - first, offset + address - first + array.nbytes)
            for first, last, _, offset in mappings
            if first <= address and address + array.nbytes <= last
        ]
    return out


def _mappings(path: Path) -> list[tuple[int, int, str, int]]:
    """Return first and last address, rights and offset in the file of each of its mappings."""
    out, name = [], str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            addresses, rights, offset = line.split(maxsplit=3)[:3]
            first, last = (int(address, 16) for address in addresses.split("-"))
            out.append((first, last, rights, int(offset, 16)))
    return out
