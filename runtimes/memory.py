"""Measures this process's memory; each row says how it was measured and whether it is a peak or a snapshot.

On Linux the rows come from /proc (exact, no package). macOS adds the physical footprint, by which it judges a process.
Elsewhere psutil returns what the system offers. A row that cannot be measured is absent, not guessed. `Meter` splits
the peak into what was there before a model was opened, its weights, and its activations. gpu.py measures GPU memory;
swap and other processes are not counted.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
"""Every row that `read` may return."""

SPLIT = ("peak_bytes", "runtime_overhead_bytes", "weights_bytes", "activations_bytes")
"""The rows of every runtime: the peak and its parts; a row that cannot be measured is absent."""


@dataclass(frozen=True)
class Reading:
    """One row of a memory measurement."""

    bytes: int
    how: str
    """What was measured, and whether it is a peak or a snapshot."""
    place: str = "process"
    """Whose memory: `process`, or `gpu`."""


def read() -> dict[str, Reading]:
    """Return rows by name: peak_rss_bytes, rss_bytes, on Linux also anon_bytes, file_bytes, pss_bytes."""
    return _linux() if sys.platform == "linux" else _other()


class Meter:
    """Splits this process's peak into runtime overhead, weights and activations. Create it just before opening a model.

    Example:
        meter = Meter()
        with meter.opening():
            session = open_model()
        session.run()
        meter.rows()["activations_bytes"]
    """

    def __init__(self) -> None:
        self._before = _levels(read())
        self._private = self._held = 0
        self._peak_of_opening = 0

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Open a network inside this context: the memory that it adds counts as weights."""
        peak = _levels(read()).peak
        yield
        now = _levels(read())
        self._private = max(0, now.private - self._before.private)
        if now.peak > peak:
            self._peak_of_opening = now.peak

    def note(self) -> None:
        """Measure the weights; call it before closing a network: mapped weights become resident as they are used."""
        mapped = max(0, _levels(read()).mapped - self._before.mapped)
        self._held = max(self._held, self._private + mapped)

    def rows(self) -> dict[str, Reading]:
        """Return the rows of SPLIT. The parts add up to the peak, unless it was reached before the model was opened."""
        self.note()
        now = _levels(read())
        rest = max(0, now.peak - self._before.resident - self._held)
        # The peak cannot be reset without hiding it from others who watch this process.
        bound = "at most, the peak was in opening: " if now.peak == self._peak_of_opening else ""
        return {
            "peak_bytes": Reading(now.peak, now.peak_how),
            "runtime_overhead_bytes": Reading(
                self._before.resident,
                f"before the model was opened: interpreter, libraries, all else of this process ({now.source})",
            ),
            "weights_bytes": Reading(self._held, f"added by opening, at one time, {now.weights_how}"),
            "activations_bytes": Reading(rest, f"{bound}peak less runtime overhead and weights"),
        }


@dataclass(frozen=True)
class _Levels:
    """A snapshot in bytes, with the parts that this system can distinguish."""

    resident: int
    private: int
    """The part of it that does not come from a file."""
    mapped: int
    peak: int
    peak_how: str
    source: str
    weights_how: str


def _levels(rows: dict[str, Reading]) -> _Levels:
    """Extract the levels from the rows of `read`."""
    if "footprint_bytes" in rows:
        now, peak = rows["footprint_bytes"].bytes, rows["peak_footprint_bytes"]
        how = "as physical footprint: weights that are mapped and clean are not in it"
        return _Levels(
            resident=now,
            private=now,
            mapped=0,
            peak=peak.bytes,
            peak_how=peak.how,
            source="physical footprint",
            weights_how=how,
        )
    now, peak = rows["rss_bytes"].bytes, rows["peak_rss_bytes"]
    if "anon_bytes" in rows:
        private, mapped = rows["anon_bytes"].bytes, rows["file_bytes"].bytes
        how = "anonymous when opened (RssAnon) and file-backed as used since (RssFile), mapped weights and library code"
        return _Levels(
            resident=now,
            private=private,
            mapped=mapped,
            peak=peak.bytes,
            peak_how=peak.how,
            source="VmRSS",
            weights_how=how,
        )
    return _Levels(
        resident=now,
        private=now,
        mapped=0,
        peak=peak.bytes,
        peak_how=peak.how,
        source="resident set",
        weights_how="as resident set, when opened",
    )


def parse_kib(text: str) -> dict[str, int]:
    """Parse the lines `Name:   12 kB` of /proc to bytes; other lines are skipped."""
    rows = (line.split() for line in text.splitlines())
    return {r[0].rstrip(":"): int(r[1]) * 1024 for r in rows if len(r) == 3 and r[2] == "kB"}


def _linux() -> dict[str, Reading]:
    status = parse_kib(Path("/proc/self/status").read_text())
    out = {name: Reading(status[key], how) for name, (key, how) in _STATUS.items() if key in status}
    if "peak_rss_bytes" not in out:  # gVisor has no VmHWM
        out["peak_rss_bytes"] = _getrusage_peak()
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
        out["peak_rss_bytes"] = _getrusage_peak()
    if sys.platform == "darwin":
        out |= _footprint()
    return out


def _getrusage_peak() -> Reading:
    import resource

    # macOS returns bytes here, Linux and the BSDs kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Reading(peak, "peak resident set since the process started (getrusage)")


def _footprint() -> dict[str, Reading]:
    """Return rows from macOS's rusage_info_v4 (16 bytes, then unsigned 64-bit fields); none if the call fails."""
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
