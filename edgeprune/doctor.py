"""What is installed here, what can be exported and run with it, and the command that adds what is missing.

Looks packages up without importing them, so it answers at once and on a device without torch. What it leaves out:
whether a package works, which the export's parity check and `edgeprune bench` find out.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from edgeprune import export, runtimes
from edgeprune.extras import COMPRESS, absent, distribution, missing


@dataclass(frozen=True)
class Finding:
    """One thing that edgeprune can do."""

    what: str
    """`compress`, `export onnx`, `run ort`."""
    works: bool
    why: str
    """Versions if it works, what is missing if not."""
    fix: str
    """Command that adds what is missing, or nothing."""


def _version(package: str) -> str:
    names = metadata.packages_distributions().get(package.split(".")[0], [package])
    try:
        return f"{package} {metadata.version(names[0])}"
    except metadata.PackageNotFoundError:
        return package


def _finding(what: str, extra: str, packages: tuple[str, ...], lacking: str = "", *, told: int = 0) -> Finding:
    """`told` is how many of the packages go without saying where they are there."""
    if gone := missing(packages):
        named = ", ".join(map(distribution, gone)).replace("|", " or ")
        return Finding(what, False, f"missing {named}", f"pip install 'edgeprune[{extra}]'")
    if lacking:
        return Finding(what, False, f"needs {lacking}", "")
    found = [next(p for p in package.split("|") if not absent(p)) for package in packages[told:]]
    return Finding(what, True, ", ".join(map(_version, found)), "")


def examine() -> list[Finding]:
    """Everything edgeprune does, in the order of work."""
    out = [_finding("compress", "compress", COMPRESS)]
    for fmt, (extra, packages) in export.NEEDS.items():
        out.append(_finding(f"export {fmt}", f"compress,{extra}", (*COMPRESS, *packages), told=len(COMPRESS)))
    for name, info in runtimes.RUNTIMES.items():
        lacking = "" if info.has_hardware() else info.hardware
        out.append(_finding(f"run {name}", info.extra, info.packages, lacking))
    return out
