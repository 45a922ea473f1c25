"""What a command took: time, and the peaks of the host's memory and of each GPU's that torch computed on."""

from __future__ import annotations

import sys

from edgeprune.common.tables import duration
from edgeprune.runtimes import memory

WORTH_SAYING_S = 60.0


def taken(seconds: float) -> str:
    """Return a line about this process.

    Args:
        seconds: since the command began.
    """
    rows = memory.read()
    peak = rows.get("peak_footprint_bytes", rows["peak_rss_bytes"]).bytes
    peaks = [f"memory {peak / 1e9:.2f} GB"]
    peaks += [f"of {name} {held / 1e9:.2f} GB" for name, held in _on_gpus().items()]
    return f"took {duration(seconds)}; peak {', '.join(peaks)}"


def _on_gpus() -> dict[str, int]:
    """Return the most bytes that torch reserved on each GPU that it used; loads no torch."""
    torch = sys.modules.get("torch")
    found: dict[str, int] = {}
    for kind in ("cuda", "xpu") if torch else ():
        module = getattr(torch, kind)
        if module.is_initialized():
            held = {f"{kind}:{index}": module.max_memory_reserved(index) for index in range(module.device_count())}
            found |= {name: number for name, number in held.items() if number}
    return found
