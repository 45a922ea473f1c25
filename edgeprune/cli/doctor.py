"""`edgeprune doctor`: what is installed, what can be done with it, and the command that installs the rest.

Packages are looked up without importing them, so that the answer comes at once and on devices without torch. Only ONNX
Runtime is imported, because it alone knows its execution providers. Whether a package works is left to the export's
parity check and to `edgeprune bench`.
"""

from __future__ import annotations

import functools
import importlib
import shlex
from dataclasses import asdict, dataclass, replace
from importlib import metadata

from edgeprune.cli import options, screen
from edgeprune.common.extras import COMPRESS, absent, conflicts, distribution, missing, outdated

EPILOG = "Example: edgeprune doctor --json"


def doctor(as_json: options.AsJson = False) -> None:
    """Show what can be compressed, exported and run here, and how to install what is missing or too old."""
    findings, clashes = examine(), conflicts()
    screen.table([("yes" if f.works else "no", f.what, f"{f.fix} ({f.why})" if f.fix else f.why) for f in findings])
    for conflict in clashes:
        screen.say(f"conflict: {conflict}")
    if as_json:
        screen.print_json({"findings": [asdict(f) for f in findings], "conflicts": clashes})


@dataclass(frozen=True)
class Finding:
    """One thing that edgeprune can do."""

    what: str
    """`compress`, `export onnx`, `run ort` and so on."""
    works: bool
    why: str
    """Versions of the packages if it works, else what is missing or too old."""
    fix: str
    """Command that installs what is missing or too old; empty if no command does."""


def examine() -> list[Finding]:
    """Examine everything that edgeprune does, in the order of work."""
    from edgeprune import export, runtimes

    out = [_finding("compress", "compress", COMPRESS)]
    for fmt, (extra, packages) in export.NEEDS.items():
        out.append(_finding(f"export {fmt}", f"compress,{extra}", packages, compress=True))
    for name, info in runtimes.RUNTIMES.items():
        lacking = "" if info.has_hardware() else info.hardware
        out.append(_finding(f"run {name}", info.extra, info.packages, lacking))
        if name == "ort" and out[-1].works:
            works, provider = _provider()
            out[-1] = replace(out[-1], works=works, why=f"{out[-1].why}; {provider}")
    return out


_distributions = functools.cache(metadata.packages_distributions)  # reads every installed package


def _version(package: str) -> str:
    names = _distributions().get(package.split(".")[0], [package])
    try:
        return f"{package} {metadata.version(names[0])}"
    except metadata.PackageNotFoundError:
        return package


def _finding(what: str, extra: str, packages: tuple[str, ...], lacking: str = "", *, compress: bool = False) -> Finding:
    """Look for what one thing needs.

    Args:
        lacking: hardware that is not here; no package would help.
        compress: also requires the `compress` extra, which is not mentioned when it is installed.
    """
    if lacking:
        return Finding(what=what, works=False, why=f"needs {lacking}", fix="")
    absent_ones = [distribution(package).replace("|", " or ") for package in missing(packages)]
    if compress and missing(COMPRESS):
        absent_ones.insert(0, "what compress needs")
    if absent_ones:
        fix = f"pip install 'edgeprune[{extra}]'"
        return Finding(what=what, works=False, why=f"missing {', '.join(absent_ones)}", fix=fix)
    if old := outdated(extra):
        why = ", ".join(f"{n} {metadata.version(n)} (needs {floor})" for n, floor in (o.split(">=") for o in old))
        return Finding(what=what, works=False, why=f"too old: {why}", fix=f"pip install {shlex.join(old)}")
    installed = [next(p for p in package.split("|") if not absent(p)) for package in packages]
    return Finding(what=what, works=True, why=", ".join(map(_version, installed)), fix="")


def _provider() -> tuple[bool, str]:
    """Return whether ONNX Runtime can be imported, and the execution provider it would use or the error."""
    from edgeprune.runtimes.providers import choose

    try:
        onnxruntime = importlib.import_module("onnxruntime")
        choice = choose(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # two ONNX Runtimes in one folder leave a broken one
        return False, f"cannot be imported: {error}"
    return True, f"{choice.providers[0]}: {choice.why}"
