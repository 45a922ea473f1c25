"""What is installed here, what can be exported and run with it, and the command that adds what is missing.

Looks packages up without importing them, so it answers at once and on a device without torch; only ONNX Runtime is
imported, which alone knows its providers. What it leaves out: whether a package works, which the export's parity check
and `edgeprune bench` find out.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from importlib import metadata

from edgeprune import export, runtimes
from edgeprune.common.extras import COMPRESS, absent, distribution, missing
from edgeprune.runtimes.providers import choose


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


_distributions = functools.cache(metadata.packages_distributions)  # reads every installed package


def _version(package: str) -> str:
    names = _distributions().get(package.split(".")[0], [package])
    try:
        return f"{package} {metadata.version(names[0])}"
    except metadata.PackageNotFoundError:
        return package


def _finding(what: str, extra: str, packages: tuple[str, ...], lacking: str = "", *, compress: bool = False) -> Finding:
    """`compress`: it needs what compressing needs as well, which goes without saying where it is there."""
    if lacking:  # no package would help
        return Finding(what, False, f"needs {lacking}", "")
    gone = [distribution(package).replace("|", " or ") for package in missing(packages)]
    if compress and missing(COMPRESS):
        gone.insert(0, "what compress needs")
    if gone:
        return Finding(what, False, f"missing {', '.join(gone)}", f"pip install 'edgeprune[{extra}]'")
    found = [next(p for p in package.split("|") if not absent(p)) for package in packages]
    return Finding(what, True, ", ".join(map(_version, found)), "")


def examine() -> list[Finding]:
    """Everything edgeprune does, in the order of work."""
    out = [_finding("compress", "compress", COMPRESS)]
    for fmt, (extra, packages) in export.NEEDS.items():
        out.append(_finding(f"export {fmt}", f"compress,{extra}", packages, compress=True))
    for name, info in runtimes.RUNTIMES.items():
        lacking = "" if info.has_hardware() else info.hardware
        out.append(_finding(f"run {name}", info.extra, info.packages, lacking))
        if name == "ort" and out[-1].works:
            works, said = _provider()
            out[-1] = replace(out[-1], works=works, why=f"{out[-1].why}; {said}")
    return out


def _provider() -> tuple[bool, str]:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        choice = choose(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # two packages in one folder leave a broken one
        return False, f"cannot be imported: {error}"
    return True, f"{choice.providers[0]}: {choice.why}"
