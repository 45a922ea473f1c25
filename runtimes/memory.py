"""This process's memory, each row with how it was measured: a peak is a peak, a snapshot says so.

Linux reads /proc (exact, no package), macOS adds the physical footprint, by which it judges a process. Elsewhere psutil
gives what the system offers, and rows it cannot measure are absent, not guessed. What it leaves out: GPU memory of
other systems, swap, other processes.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_STATUS = {
    "peak_rss_bytes": ("VmHWM", "peak resident set since the process started (VmHWM)"),
    "rss_bytes": ("VmRSS", "resident set now (VmRSS)"),
    "anon_bytes": ("RssAnon", "anonymous part of it now: must stay resident (RssAnon)"),
    "file_bytes": ("RssFile", "file-backed part of it now: the system may drop and read it again (RssFile)"),
}

_FOOTPRINT = {
    "footprint_bytes": (7, "physical footprint now: dirty, compressed and GPU memory (ri_phys_footprint)"),
    "peak_footprint_bytes": (28, "peak physical footprint since the process started (ri_lifetime_max_phys_footprint)"),
}

ROWS = (*_STATUS, "pss_bytes", *_FOOTPRINT)
"""Every row that `read` may give."""


@dataclass(frozen=True)
class Reading:
    """One row."""

    bytes: int
    how: str
    """What was read, and whether it is a peak or a snapshot."""


def read() -> dict[str, Reading]:
    """Named rows: peak_rss_bytes, rss_bytes, and on Linux anon_bytes, file_bytes, pss_bytes."""
    return _linux() if sys.platform == "linux" else _other()


def parse_kib(text: str) -> dict[str, int]:
    """`Name:   12 kB` lines of /proc to bytes; other lines are passed over."""
    rows = (line.split() for line in text.splitlines())
    return {r[0].rstrip(":"): int(r[1]) * 1024 for r in rows if len(r) == 3 and r[2] == "kB"}


def _linux() -> dict[str, Reading]:
    status = parse_kib(Path("/proc/self/status").read_text())
    out = {name: Reading(status[key], how) for name, (key, how) in _STATUS.items() if key in status}
    rollup = Path("/proc/self/smaps_rollup")  # absent in some containers
    if rollup.exists() and "Pss" in (sums := parse_kib(rollup.read_text())):
        out["pss_bytes"] = Reading(
            sums["Pss"], "resident now, pages shared with other processes divided among them (PSS)"
        )
    return out


def _other() -> dict[str, Reading]:
    import psutil

    info = psutil.Process().memory_info()
    out = {"rss_bytes": Reading(info.rss, "resident set now (psutil)")}
    if hasattr(info, "peak_wset"):
        out["peak_rss_bytes"] = Reading(info.peak_wset, "peak working set (psutil, Windows)")
    else:
        import resource

        # macOS gives bytes here, the BSDs kilobytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        out["peak_rss_bytes"] = Reading(peak, "peak resident set (getrusage)")
    if sys.platform == "darwin":
        out |= _footprint()
    return out


def _footprint() -> dict[str, Reading]:
    """Rows of macOS's rusage_info_v4: 16 bytes, then unsigned 64-bit fields. None where the system does not answer."""
    try:
        library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
    except OSError:
        return {}
    buffer = ctypes.create_string_buffer(512)  # newer systems may write more than the structure's 296 bytes
    if library.proc_pid_rusage(os.getpid(), 4, buffer):
        return {}
    return {
        name: Reading(struct.unpack_from("<Q", buffer, 16 + 8 * field)[0], how)
        for name, (field, how) in _FOOTPRINT.items()
    }
