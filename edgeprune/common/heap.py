"""How memory comes from the system and goes back, where large tensors come and go beside small ones.

glibc learns from what is freed to keep pieces of up to 32 MB in its heap, where what a traced graph left lies between
them: SD3.5 Large's export, a block at a time, peaked at 3.3 GB that way instead of 1.6. What it leaves out: other C
libraries, and work that makes the same tensors again and again, which a heap serves faster.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's <malloc.h>."""
_LARGE, _MOST_LEARNT = 1 << 20, 32 << 20


def large_pages() -> None:
    """PyTorch asks Linux for pages of 2 MB for its large tensors; to be called before it allocates anything.

    Quantising FLUX spent more time in faults of 4 KB pages than in arithmetic. A user's own setting stays.
    """
    os.environ.setdefault(_LARGE_PAGES, "1")


@contextmanager
def returned() -> Iterator[None]:
    """While this lasts, pieces of 1 MB and more are mapped one by one, and unmapped when they are freed."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:  # not glibc
        yield
        return
    set_option(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _MOST_LEARNT)
