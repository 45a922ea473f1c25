"""edgeprune: make MMDiT diffusion models small enough for edge devices, and run them there.

Importing this package is cheap: torch and the other heavy packages load at the first use of something that needs them.
Each folder has one subject; CONTRIBUTING.md lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.common.version import VERSION as __version__

if TYPE_CHECKING:
    from edgeprune.artefact.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` at its first use (PEP 562), since it needs torch."""
    if name == "load":
        from edgeprune.artefact.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
