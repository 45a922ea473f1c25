"""How much memory this process may take, and how much it takes. Torch-free: runtimes on a device use it, too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgeprune.common.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CGROUP = Path("/sys/fs/cgroup")
SMALL_BYTES = 10**9
"""Most bytes in float32 of a network whose memory and speed call for nothing less."""
SHARE = 0.9
"""Share of the free memory that a process takes without a wish: the rest is for others, and for what is not counted."""


@dataclass(frozen=True)
class ComputeOptions:
    """Where networks compute, and in how much memory."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` or `xpu`; auto takes a GPU that torch finds, else the processor."""
    memory: int | None = None
    """Most bytes of the process, or on a GPU of the device; None takes most of what is free."""
    longest_s: float | None = None
    """Refuse a stage that takes at least so many seconds, before it begins; None takes any time."""


def parse_bytes(text: str, option: str) -> int:
    """Return the bytes of a size such as 3.2GB or 800MiB.

    Args:
        text: a number, then a unit; without one it is bytes.
        option: its name, for the message.

    Raises:
        InputError: it is not such a size, or not above 0.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([a-z]*)", text.strip(), re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise InputError(f"{option}: found {text!r}, expected a size such as 3.2GB or 800MB")
    return size


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def allowed() -> int:
    """Return the bytes that this process may have: its own, and most of what is free here and in its container."""
    free = [int(psutil.virtual_memory().available)]
    limit, current = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and current is not None:
        free.append(max(0, limit - current + _page_cache()))
    return resident() + int(SHARE * min(free))


def _page_cache() -> int:
    """Return the bytes of files that the container holds in memory, which the kernel frees when they are needed."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or `max`
        return None
