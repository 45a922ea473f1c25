"""The committed results of machines with the hardware, and the page that is made of them."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from edgeprune.common.files import check_schema, read_json, write_json
from edgeprune.common.tables import markdown_table
from edgeprune.common.version import VERSION
from edgeprune.experiments.hardware.running import Result

SCHEMA_VERSION = 1
PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "nncf", "tensorrt", "tensorrt-rtx", "onnxruntime",
    "onnxruntime-gpu", "cuda-bindings", "nvidia-ml-py", "coremltools",
)  # fmt: skip
NOT_RUN = {
    "gpu": "Not run yet: no machine with an NVIDIA GPU was at hand. Run `make check-gpu` on one, and commit what it "
    "writes.",
    "mac": "Not run yet: no Mac was at hand. Run `make check-mac` on one, and commit what it writes.",
}


def machine(kind: str) -> dict[str, Any]:
    """Return the name of the device, its driver, and the versions of packages."""
    import torch

    name, driver = platform.processor() or platform.machine(), platform.platform()
    if kind == "gpu" and torch.cuda.is_available():
        name, driver = torch.cuda.get_device_name(0), _driver()
    return {"device": name, "driver": driver, "versions": versions()}


def _driver() -> str:
    """Return the driver's version by nvidia-smi, and CUDA's by torch."""
    import torch

    found = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        found = (asked.stdout.splitlines() or [found])[0]
    return f"driver {found}, CUDA {torch.version.cuda}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version(), "edgeprune": VERSION}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load(path: Path) -> list[dict[str, Any]]:
    """Read the committed results; none if there is no file.

    Raises:
        InputError: the file is of another version.
    """
    if not path.is_file():
        return []
    data = read_json(path)
    check_schema(path, data.get("schema_version"), SCHEMA_VERSION, "run it again")
    found: list[dict[str, Any]] = data["results"]
    return found


def merge(path: Path, about: dict[str, Any], made: list[Result]) -> None:
    """Put a machine's results into the file, in place of what a device of this name had of these checks."""
    entries = load(path)
    at = next((i for i, other in enumerate(entries) if other["device"] == about["device"]), len(entries))
    before = entries[at]["checks"] if at < len(entries) else []
    new = {result["name"]: result for result in made}
    kept = [new.pop(result["name"], result) for result in before]
    entries[at : at + 1] = [about | {"date": time.strftime("%Y-%m-%d"), "checks": [*kept, *new.values()]}]
    write_json(path, {"schema_version": SCHEMA_VERSION, "results": entries})


def markdown(kind: str, entries: list[dict[str, Any]]) -> str:
    """Return what the page shows: a table for each device, and what was left out."""
    if not entries:
        return NOT_RUN[kind]
    parts = []
    for entry in entries:
        listed = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        ran = [result for result in entry["checks"] if result["outcome"] != "left out"]
        rows = [
            (r["name"], r["what"], r["outcome"], r["figure"].replace("|", "/"), f"{r['seconds']:.1f} s") for r in ran
        ]
        parts += [f"## {entry['device']}", f"{entry['driver']}; {entry['date']}; {listed}."]
        parts.append(markdown_table(("check", "what", "result", "figure", "time"), rows))
        left_out = [r for r in entry["checks"] if r["outcome"] == "left out"]
        if left_out:
            parts.append("Left out:\n\n" + "\n".join(f"- `{r['name']}`: {r['figure']}" for r in left_out))
    return "\n\n".join(parts)
