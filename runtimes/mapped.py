"""Weights that a vendor maps from a file: given back while it repacks them, so that they are not in memory twice.

OpenVINO maps its `.bin`, copies every weight into a layout of its own, and keeps the mapping: the peak is the sum. The
kernel is told in turn that the pages are not needed (MADV_PAGEOUT, which never loses data: what is read again is read
from the file). Linux 5.4 and later; elsewhere nothing happens. What it leaves out: memory that is not of a file.
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
def given_back(path: Path) -> Iterator[None]:
    """While this lasts, and once at its end, the mapped pages of a file are given back."""
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(EVERY_S):
            give_back(path)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        give_back(path)


def give_back(path: Path) -> None:
    """Tell the kernel that no page of this file is needed now."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    name = str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            first, last = (int(address, 16) for address in line.split(" ", 1)[0].split("-"))
            # Refused by an older kernel, or unmapped meanwhile: the pages stay, which is no error.
            madvise(first, last - first, _PAGEOUT)
