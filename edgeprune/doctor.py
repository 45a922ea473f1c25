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
from edgeprune.runtimes.providers import choose

COMPRESS = ("accelerate", "diffusers", "jinja2", "matplotlib", "nncf", "scipy", "torch", "transformers")


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


def _present(package: str) -> bool:
    return not runtimes.absent(package)


_distributions = functools.cache(metadata.packages_distributions)  # reads every installed package


def _version(package: str) -> str:
    names = _distributions().get(package.split(".")[0], [package])
    try:
        return f"{package} {metadata.version(names[0])}"
    except metadata.PackageNotFoundError:
        return package


def _finding(what: str, extra: str, packages: tuple[str, ...], lacking: str = "", *, told: int = 0) -> Finding:
    """`told` is how many of the packages go without saying where they are there."""
    missing = [p for p in packages if not any(map(_present, p.split("|")))]
    if missing:
        return Finding(
            what, False, f"missing {', '.join(missing).replace('|', ' or ')}", f"pip install 'edgeprune[{extra}]'"
        )
    if lacking:
        return Finding(what, False, f"needs {lacking}", "")
    found = [next(p for p in package.split("|") if _present(p)) for package in packages[told:]]
    return Finding(what, True, ", ".join(map(_version, found)), "")


def examine() -> list[Finding]:
    """Everything edgeprune does, in the order of work."""
    out = [_finding("compress", "compress", COMPRESS)]
    for fmt, (extra, packages) in export.NEEDS.items():
        out.append(_finding(f"export {fmt}", f"compress,{extra}", (*COMPRESS, *packages), told=len(COMPRESS)))
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


def conflicts() -> list[str]:
    """Packages that spoil each other, one line each."""
    installed = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edgeprune[onnx-gpu]'"
        ]
    return []
