"""`python -m edgeprune.experiments.hardware gpu|mac`; see `__init__.py`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import edgeprune

ROOT = Path(__file__).parents[3]
if importlib.util.find_spec("edgeprune.runtimes") is None:  # a checkout that is not installed
    edgeprune.__path__.append(str(ROOT))

from edgeprune.experiments.hardware import results, running  # noqa: E402
from edgeprune.experiments.hardware.place import Place  # noqa: E402
from edgeprune.experiments.hardware.registry import MODULES, checks  # noqa: E402
from edgeprune.experiments.pages import insert  # noqa: E402


def main() -> int:
    """Run the checks, show them, write the page; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.hardware", description=__doc__)
    parser.add_argument("kind", choices=list(MODULES), help="gpu: one NVIDIA GPU; mac: Core ML and mps")
    parser.add_argument("names", nargs="*", help="checks to run; without any, all")
    parser.add_argument("--list", action="store_true", help="only list the checks, with the most seconds of each")
    parser.add_argument("--page", type=Path, help="page to write; docs/KIND.md of the checkout without it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    known = checks(chosen.kind)
    names = chosen.names or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"found {unknown[0]!r}, expected one of {', '.join(known)}")
    if chosen.list:
        for one in known.values():
            print(f"{one.name:16} {one.seconds:4} s  {one.what}")
        return 0
    if chosen.worker:
        import torch

        running.work(chosen.kind, names, Place(torch.device(running.device_of(chosen.kind)), chosen.worker))
        return 0
    page = chosen.page or ROOT / "docs" / f"{chosen.kind}.md"
    if why := _absent(chosen.kind):
        print(why, file=sys.stderr)
        return 1
    return run(chosen.kind, names, page)


def _absent(kind: str) -> str | None:
    """Return why nothing can be checked here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed, which every check needs"
    if kind == "gpu" and not torch.cuda.is_available():
        return "torch finds no CUDA device here; run this on a machine with an NVIDIA GPU"
    if kind == "mac" and not torch.backends.mps.is_available():
        return "torch finds no mps device here; run this on a Mac with Apple silicon"
    return None


def run(kind: str, names: list[str], page: Path) -> int:
    """Run checks, merge their results, and write the page."""
    about, made = results.machine(kind), []
    print(f"{about['device']}, {about['driver']}", flush=True)
    for result in running.run_all(kind, names):
        made.append(result)
        print(f"{result['outcome']:8} {result['name']:16} {result['seconds']:6.1f} s  {result['figure']}", flush=True)
    path = page.with_suffix(".json")
    results.merge(path, about, made)
    insert(page, results.markdown(kind, results.load(path)))
    failed = sum(result["outcome"] == "failed" for result in made)
    left = sum(result["outcome"] == "left out" for result in made)
    print(f"{len(made) - failed - left} right, {failed} failed, {left} left out; in {page}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
