"""How many threads a process should compute with: what its affinity, its container and the processor's cores allow.

Runtimes count the machine's cores. In a container with a quota of 2 of 64, their 64 threads wait for each other.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def usable() -> int:
    """Return the number of threads, at least 1: the least of affinity, cgroup quota (rounded up) and physical cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    quota = _quota(_CGROUPS, Path("/proc/self/cgroup"))
    return max(1, min(allowed, physical, math.ceil(quota) if quota else allowed))


def _quota(root: Path, own: Path) -> float | None:
    """Return the CPUs that cgroups allow this process, version 2 or 1; None without a limit.

    Args:
        root: where cgroups are mounted.
        own: the file that names the process's groups, `NUMBER:CONTROLLERS:PATH` per line.
    """
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        # In a container, its own group is often mounted as the root; a limit of any group above counts too.
        below = top / path.strip("/")
        for folder in (below, *below.parents):
            if folder.is_relative_to(top):
                found.append(_limit(folder))
    return min((limit for limit in found if limit), default=None)


def _limit(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us").strip(),
        _read(folder / "cpu.cfs_period_us").strip(),
    ]
    try:
        quota, period = map(float, words)
    except ValueError:  # `max`, or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
