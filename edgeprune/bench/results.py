"""The figures of a bench as data, and their JSON, which docs/bench.md describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.files import check_schema, read_json
from edgeprune.common.intervals import paired_drop
from edgeprune.runtimes import memory

SCHEMA_VERSION = 2

MEASURES: dict[str, tuple[str, str]] = {
    "load_s": ("load", "load"),
    "first_step_s": ("first step", "first_step"),
    "step_p50_s": ("warm step, p50", "step_p50"),
    "step_p95_s": ("warm step, p95", "step_p95"),
    "step_floor_s": ("floor: transformer bytes / memory bandwidth", "step_floor"),
    "modulation_s": ("modulation of an image, before its first step", "modulation"),
    "image_p50_s": ("image, p50", "image"),
    "transformer_weights_bytes": ("transformer weights, as computed", "transformer_weights"),
    "transformer_disk_bytes": ("transformer on disk", "transformer_disk"),
    "total_disk_bytes": ("all weights on disk", "disk"),
    "peak_bytes": ("peak memory", "peak"),
    "peak_above_runtime_bytes": ("of which above interpreter and libraries", "peak_above_runtime"),
    "runtime_overhead_bytes": ("of which runtime: interpreter and libraries", "runtime_overhead"),
    "weights_bytes": ("of which weights, as loaded", "weights"),
    "activations_bytes": ("of which activations", "activations"),
    "peak_rss_bytes": ("peak of the process on the host", "peak_rss"),
    "rss_bytes": ("settled: resident", "rss"),
    "pss_bytes": ("settled: PSS", "pss"),
    "anon_bytes": ("settled: anonymous", "anon"),
    "file_bytes": ("settled: file-backed", "file"),
}
"""Key of a value in the result: its label in the table and the stem of its ratio (`load` gives `load_ratio`)."""


@dataclass(frozen=True)
class Quality:
    """Score of one variant on the evaluation prompts of shapes world."""

    score: float
    score_low: float | None
    """95 % interval over prompts (intervals.py); None for a single prompt."""
    score_high: float | None
    tasks: dict[str, float]
    images: int
    prompt_values: list[float] = field(default_factory=list)
    """The mean over its images for each prompt."""
    prompt_tasks: list[str] = field(default_factory=list)
    """The task of each prompt."""


@dataclass(frozen=True)
class Measured:
    """One variant's figures."""

    name: str
    folder: str
    runtime: str
    provider: str
    provider_why: str
    """Why the runtime chose this provider."""
    memory_of: str
    """What the memory rows (memory.SPLIT) describe: `process` or `gpu`."""
    precision: str
    values: dict[str, float | int | None]
    """Keys of MEASURES; None where this system cannot measure it."""
    steps_s: list[float]
    """Every warm step."""
    images_s: list[float]
    how: dict[str, str]
    """How each memory row was measured."""
    quality: Quality | None = None
    identity: str | None = None
    """Of the weights, see `Manifest.identity`; None of an original."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the images that differ from the folder's own."""


@dataclass(frozen=True)
class Comparison:
    """One variant against the first."""

    ratios: dict[str, float | None]
    """Keys `<stem>_ratio`: this variant's value divided by the first's; bytes by the smallest of the originals."""
    step_p50_ratio_interval: tuple[float, float] | None
    """Bootstrap 95 % interval of step_p50_ratio over the warm steps of both; None if either has a single one."""
    psnr_db: float | None = None
    """Mean over images at equal prompts and seeds; None without quality. Equal images count as 100 dB."""
    score_drop: float | None = None
    """How far this score is below the first's, as a share of the first's."""
    score_drop_interval: tuple[float, float] | None = None
    """Its 95 % interval over prompts, paired (intervals.py); None for a single prompt."""


@dataclass(frozen=True)
class BenchResult:
    """All figures of a run."""

    variants: list[Measured]
    """The first is the reference."""
    comparisons: dict[str, Comparison]
    """By variant name, without the reference."""
    machine: dict[str, Any]
    settings: dict[str, Any]
    slower_originals: list[Measured] = field(default_factory=list)
    """The original in precisions that are not faster here than the reference's; without quality."""
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump; docs/bench.md describes them."""
        return {
            "schema_version": self.schema_version,
            "machine": self.machine,
            "settings": self.settings,
            "variants": [_variant_json(m) for m in self.variants],
            "slower_originals": [_variant_json(m) for m in self.slower_originals],
            "comparisons": {
                name: c.ratios
                | {
                    "step_p50_ratio_interval": c.step_p50_ratio_interval and list(c.step_p50_ratio_interval),
                    "psnr_db": c.psnr_db,
                    "score_drop": c.score_drop,
                    "score_drop_interval": c.score_drop_interval and list(c.score_drop_interval),
                }
                for name, c in self.comparisons.items()
            },
        }


def compare(
    first: Measured,
    other: Measured,
    psnr: float | None,
    slower: Sequence[Measured] = (),
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Return the ratios other / first; None between the memory of a process and that of a GPU.

    Args:
        first: the reference.
        other: the variant to compare with it.
        psnr: decibels between their images.
        slower: the reference in slower precisions. Ratios of bytes refer to the smallest of all.
        draws: the number of bootstrap resamples.
        seed: seeds the resampling.
    """
    ratios: dict[str, float | None] = {}
    for key, (_, stem) in MEASURES.items():
        value, reference = other.values[key], first.values[key]
        if key.endswith("_bytes"):
            sizes = [v for m in (first, *slower) if m.memory_of == first.memory_of and (v := m.values[key]) is not None]
            reference = min(sizes, default=None)
        comparable = key not in memory.SPLIT or other.memory_of == first.memory_of
        ratios[f"{stem}_ratio"] = value / reference if comparable and value is not None and reference else None
    rng = np.random.default_rng(seed)

    def medians(times: list[float]) -> NDArray[np.float64]:
        values = np.asarray(times)
        return np.asarray(np.median(values[rng.integers(0, len(values), (draws, len(values)))], axis=1))

    interval = None
    if min(len(first.steps_s), len(other.steps_s)) > 1:
        low, high = np.quantile(medians(other.steps_s) / medians(first.steps_s), [0.025, 0.975])
        interval = float(low), float(high)
    drop = drop_interval = None
    if first.quality and other.quality and first.quality.score > 0:
        drop = 1 - other.quality.score / first.quality.score
        drop_interval = _paired(first.quality, other.quality)
    return Comparison(
        ratios=ratios, step_p50_ratio_interval=interval, psnr_db=psnr, score_drop=drop,
        score_drop_interval=drop_interval,
    )  # fmt: skip


def _paired(first: Quality, other: Quality) -> tuple[float, float] | None:
    """Return the interval of the relative drop of two scores on the same prompts."""
    if not first.prompt_values or first.prompt_tasks != other.prompt_tasks:
        return None
    relative = paired_drop(first.prompt_values, other.prompt_values, first.prompt_tasks).relative
    if relative is None or relative.low is None or relative.high is None:
        return None
    return relative.low, relative.high


def _variant_json(m: Measured) -> dict[str, Any]:
    plain = {k: v for k, v in vars(m).items() if k not in ("values", "quality")}
    return plain | m.values | {"quality": vars(m.quality) if m.quality else None}


def load(path: Path) -> dict[str, Any]:
    """Read the JSON that `to_json` made.

    Raises:
        InputError: the file is not the JSON of a bench.
    """
    data = read_json(path)
    check_schema(path, data.get("schema_version"), SCHEMA_VERSION, "run `edgeprune bench` again")
    variants, comparisons, machine = (data.get(name) for name in ("variants", "comparisons", "machine"))
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) for v in variants):
        raise InputError(f"{path}: variants: found {fields.shown(variants)}, expected objects")
    if not isinstance(comparisons, dict) or not all(isinstance(c, dict) for c in comparisons.values()):
        raise InputError(f"{path}: comparisons: found {fields.shown(comparisons)}, expected objects by variant")
    if not isinstance(machine, dict) or not {"cpu", "cores"} <= machine.keys():
        raise InputError(f"{path}: machine: found {fields.shown(machine)}, expected cpu and cores")
    slower = data.get("slower_originals", [])
    if not isinstance(slower, list) or not all(isinstance(v, dict) for v in slower):
        raise InputError(f"{path}: slower_originals: found {fields.shown(slower)}, expected objects")
    for variant in (*variants, *slower):
        for name in ("name", "runtime", "precision"):
            fields.text(variant, name, f"{path}: variants")
    numbers = [(v, key) for v in (*variants, *slower) for key in MEASURES]
    numbers += [(c, f"{stem}_ratio") for c in comparisons.values() for _, stem in MEASURES.values()]
    for row, key in numbers:
        if not isinstance(row.get(key), (int, float, NoneType)):
            raise InputError(f"{path}: {key}: found {fields.shown(row[key])}, expected a number or null")
    return data
