"""How the allocator obtains memory from the system and returns it.

glibc adapts to freed allocations: it starts to keep allocations of up to 32 MB in its heap. There the small objects of
a traced graph lie between them, so freed memory cannot return to the system. Exporting SD3.5 Large block by block
peaked at 3.3 GB that way, and at 1.6 GB with `returned()`. Only glibc is handled. Work that allocates the same tensors
again and again is faster without this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD in glibc's <malloc.h>."""
_LARGE, _MOST_LEARNT = 1 << 20, 32 << 20


def large_pages() -> None:
    """Let PyTorch request 2 MB pages from Linux for large tensors. Call this before PyTorch allocates anything.

    Without it, quantising FLUX spent more time in page faults of 4 KB pages than in arithmetic. It also keeps tensors
    of 2 to 32 MB out of the heap, where they leave holes: an image of SD3.5 Large at 1024x1024, read block by block,
    took 5 GB of it without, and 1 GB with. A value that the user has set is kept.
    """
    os.environ.setdefault(_LARGE_PAGES, "1")


def trim() -> None:
    """Return to the system what the heap has free between its allocations: 1.0 of 1.7 GB after INT4 of SD3.5 Large."""
    release = _libc("malloc_trim")
    if release is not None:
        release(0)


@contextmanager
def returned() -> Iterator[None]:
    """Inside the context, map each allocation of 1 MB or more separately and unmap it when it is freed."""
    set_option = _libc("mallopt")
    if set_option is None:  # not glibc
        yield
        return
    set_option(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _MOST_LEARNT)


def _libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc; None on other systems."""
    import ctypes  # here, because every command imports this module

    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
