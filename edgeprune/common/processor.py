"""The instructions that this machine's processor has."""

from __future__ import annotations

import functools
from pathlib import Path

MULTIPLY_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply bf16, as Linux names them on x86 and on Arm."""
INT8_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni"})
"""Instructions of x86 that multiply and add four pairs of int8 numbers at a time."""


def lists_x86(names: frozenset[str]) -> bool:
    """Return whether these are all instructions of an x86 processor, so that what is not among them is not there."""
    return any(name.startswith(("sse", "avx")) for name in names)


@functools.cache
def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the instructions by the names that Linux gives them; none where the system does not list them so."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(word for line in lines for word in line.split())
