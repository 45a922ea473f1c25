"""The committed results, docs/full-size.json, and the tables of docs/full-size.md that are made from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.bench.machine import machine
from edgeprune.common.files import check_schema, read_json, write_json
from edgeprune.common.tables import markdown_table
from edgeprune.common.version import VERSION
from edgeprune.experiments.full_size.recording import Values
from edgeprune.residency.compute import multiplies_bf16

SCHEMA_VERSION = 1


def load(path: Path) -> list[dict[str, Any]]:
    """Read the results: one entry per row and processor.

    Raises:
        InputError: the file is damaged or of another version.
    """
    if not path.is_file():
        return []
    data = read_json(path)
    check_schema(path, data.get("schema_version"), SCHEMA_VERSION, "measure again")
    found: list[dict[str, Any]] = data["results"]
    return found


def merge(path: Path, row: str, stages: Mapping[str, Values]) -> None:
    """Put a row's stages into the results, in place of those that this processor had."""
    cpu, cores = _processor()
    entry = {
        "row": row, "cpu": cpu, "cores": cores, "date": time.strftime("%Y-%m-%d"),
        "version": VERSION, "stages": dict(stages),
    }  # fmt: skip
    key = _key(entry)
    entries = load(path)
    at = next((i for i, other in enumerate(entries) if _key(other) == key), len(entries))
    entries[at : at + 1] = [entry]
    write_json(path, {"schema_version": SCHEMA_VERSION, "results": entries})


def measured_seconds(path: Path, row: str) -> float | None:
    """Return how long the row took on this processor, by the results; None if not all of it is known."""
    for entry in load(path):
        if _key(entry) == (row, *_processor()) and all("seconds" in s for s in entry["stages"].values()):
            return float(sum(stage["seconds"] for stage in entry["stages"].values()))
    return None


def _processor() -> tuple[str, int]:
    """Return this processor's name, which says so if it computes large models in float32, and its cores."""
    here = machine(0.0)
    return here["cpu"] + ("" if multiplies_bf16() else ", float32"), here["cores"]


def _key(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return entry["row"], entry["cpu"], entry["cores"]


def markdown(entries: list[dict[str, Any]]) -> str:
    """Return the tables of the page, processor by processor."""
    parts = []
    for cpu, cores in dict.fromkeys((entry["cpu"], entry["cores"]) for entry in entries):
        own = [entry for entry in entries if (entry["cpu"], entry["cores"]) == (cpu, cores)]
        stages = [(entry, name, values) for entry in own for name, values in entry["stages"].items()]
        parts += [f"{cpu}, {cores} cores:", _stage_table([s for s in stages if "seconds" in s[2]])]
        for entry, name, values in stages:
            if "seconds" not in values:
                parts += [f"{name} ({entry['date']}):", _bench_table(values)]
    return "\n\n".join(parts)


def _stage_table(stages: list[tuple[dict[str, Any], str, Values]]) -> str:
    lines = []
    for entry, name, values in stages:
        size = f"{values['file_bytes'] / 1e9:.2f} GB" if "file_bytes" in values else ""
        label = f"{name} ({values['said']})" if "said" in values else name
        peak = f"{values['peak_bytes'] / 1e9:.2f} GB"
        lines.append((entry["row"], label, f"{values['seconds']:.4g} s", peak, size, entry["date"]))
    return markdown_table(("row", "what", "time", "peak memory", "file", "date"), lines)


def _bench_table(values: Values) -> str:
    """Return the figures of one bench by runtime, against the first."""
    first = next(iter(values.values()))
    lines = []
    for runtime, figures in values.items():
        faster, smaller = first["step_p50_s"] / figures["step_p50_s"], figures["peak_bytes"] / first["peak_bytes"]
        lines.append(
            (
                runtime,
                f"{figures['step_p50_s']:.1f} s",
                f"{faster:.2f} times faster",
                f"{figures['load_s']:.0f} s",
                f"{figures['peak_bytes'] / 1e9:.2f} GB",
                f"{smaller:.3f}",
            )
        )
    return markdown_table(("runtime", "step", "against the original", "load", "peak", "against"), lines)
