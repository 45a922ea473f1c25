"""Evicts the pages of a memory-mapped weight file while a vendor repacks it, so weights are not in memory twice.

OpenVINO maps its `.bin`, copies every weight into its own layout, and keeps the mapping: the peak is the sum of both.
MADV_PAGEOUT tells the kernel that the pages are not needed now. It never loses data: a page that is read again comes
from the file. It needs Linux 5.4 or later; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGEOUT = 21
"""MADV_PAGEOUT of <linux/mman.h>."""
EVERY_S = 0.2


@contextmanager
def evicting(path: Path) -> Iterator[None]:
    """Evict the mapped pages of a file repeatedly inside this context, and once at its end."""
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(EVERY_S):
            evict(path)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        evict(path)


def evict(path: Path) -> None:
    """Tell the kernel that no mapped page of this file is needed now."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    name = str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            first, last = (int(address, 16) for address in line.split(" ", 1)[0].split("-"))
            # An older kernel refuses, or the range was unmapped meanwhile: the pages stay, which is harmless.
            madvise(first, last - first, _PAGEOUT)
