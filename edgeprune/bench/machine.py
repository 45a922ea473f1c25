"""The computer that a bench ran on, and the bandwidth of its memory."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np


def memory_bandwidth(size_bytes: int = 128_000_000, repeats: int = 5) -> float:
    """Return bytes per second, read and written, while numpy copies an array; the best of `repeats` copies."""
    source = np.ones(size_bytes // 8)
    target = np.empty_like(source)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times[1:])


def machine(bandwidth: float) -> dict[str, Any]:
    """Return the system, the processor, its cores and load, and the Python version, as in the JSON of a bench."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = match[1]
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "memory_bandwidth_bytes_per_s": bandwidth,
    }
