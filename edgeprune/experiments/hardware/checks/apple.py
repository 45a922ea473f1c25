"""Core ML: packages that are compiled, predict, and compute what torch computes."""

from __future__ import annotations

import sys

from edgeprune.experiments.hardware.checks.drawing import compare_image
from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import LeftOut, check

_NEEDS = ("diffusers", "coremltools")


def _predicts() -> bool:
    """Return whether Core ML runs here."""
    return sys.platform == "darwin"


@check("an export made on a Mac: its packages' predictions against the checkpoint", seconds=240, needs=_NEEDS)
def coreml_export(place: Place) -> str:
    """Export the small SD3; the export itself compares."""
    from edgeprune.api import export

    if not _predicts():
        raise LeftOut("Core ML predicts on macOS only")
    made = export(place.small("sd3"), place.scratch / "coreml", "coreml", device="macbook-m")
    return ", ".join(f"{name} {errors}" for name, errors in made.record["parity"].items())


def _units(place: Place, units: str) -> str:
    """Draw an image with some of the compute units."""
    folder = place.scratch / "coreml"
    if not folder.is_dir():
        raise LeftOut("there is no export to run, see coreml-export")
    found, runtime = compare_image(place, folder, "coreml", least=25, compute_units=units)
    times = runtime.backend.times.values()
    compiled, specialised = (sum(t[kind] for t in times) for kind in ("compile_s", "specialise_s"))
    return f"{found:.0f} dB from torch's image; compiled in {compiled:.1f} s, specialised in {specialised:.1f} s"


@check("`ComputeUnit.ALL`: compile_model, CompiledMLModel, predict", seconds=120, needs=_NEEDS)
def coreml_all(place: Place) -> str:
    """Draw an image."""
    return _units(place, "all")


@check("`ComputeUnit.CPU_ONLY`", seconds=120, needs=_NEEDS)
def coreml_cpu(place: Place) -> str:
    """Draw an image."""
    return _units(place, "cpu_only")


@check("`ComputeUnit.CPU_AND_GPU`", seconds=120, needs=_NEEDS)
def coreml_gpu(place: Place) -> str:
    """Draw an image."""
    return _units(place, "cpu_and_gpu")


@check("`ComputeUnit.CPU_AND_NE`", seconds=120, needs=_NEEDS)
def coreml_ne(place: Place) -> str:
    """Draw an image."""
    return _units(place, "cpu_and_ne")


@check("footprint_bytes and its peak (`proc_pid_rusage`), `getrusage`", seconds=20)
def footprint(place: Place) -> str:
    """Read the rows of memory of this process."""
    from edgeprune.runtimes import memory

    rows = memory.read()
    if "footprint_bytes" not in rows:
        raise LeftOut(f"only macOS has a footprint; here there are {sorted(rows)}")
    return ", ".join(f"{name} {row.bytes / 1e6:.0f} MB" for name, row in rows.items())
