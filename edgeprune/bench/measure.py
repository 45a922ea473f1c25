"""Measures variants of a model side by side: each in a fresh process, then ratios, a table, JSON and assertions.

The first variant is the reference; every other gets ratio rows against it. docs/bench.md describes the JSON. This
module imports no torch: the workers do, each its own runtime. What it leaves out: GPUs, energy, several machines.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import runtimes
from edgeprune.common import errors, fields
from edgeprune.common.errors import AssertionMissedError, EdgepruneError, InputError
from edgeprune.common.files import check_schema, read_json
from edgeprune.common.terminal import printable
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.runtimes import memory

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 2
PROMPT = "two red circles"

MEASURES: dict[str, tuple[str, str]] = {
    "load_s": ("load", "load"),
    "first_step_s": ("first step", "first_step"),
    "step_p50_s": ("warm step, p50", "step_p50"),
    "step_p95_s": ("warm step, p95", "step_p95"),
    "step_floor_s": ("floor: transformer bytes / memory bandwidth", "step_floor"),
    "image_p50_s": ("image, p50", "image"),
    "transformer_weights_bytes": ("transformer weights as computed with", "transformer_weights"),
    "transformer_disk_bytes": ("transformer on disk", "transformer_disk"),
    "total_disk_bytes": ("all weights on disk", "disk"),
    "peak_bytes": ("peak memory", "peak"),
    "runtime_overhead_bytes": ("of it runtime: interpreter and libraries", "runtime_overhead"),
    "weights_bytes": ("of it weights, as loaded", "weights"),
    "activations_bytes": ("of it activations", "activations"),
    "rss_bytes": ("settled: resident", "rss"),
    "pss_bytes": ("settled: PSS", "pss"),
    "anon_bytes": ("settled: anonymous", "anon"),
    "file_bytes": ("settled: file-backed", "file"),
}
"""Key of a value in the result: its label in the table and the stem of its ratio (`load` gives `load_ratio`)."""

Progress = Callable[[str], None]
"""Called with one line of text as the work goes on."""


@dataclass(frozen=True)
class Variant:
    """What to measure."""

    name: str
    """Shown in the table; unique in a run."""
    folder: Path
    runtime: str | None = None
    """`ort`, `eager`, or None to choose by the folder."""
    dtype: str | None = None
    """`bf16` or `fp32`, for `eager`; None for its default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the runtime, see `runtimes.load`."""


@dataclass(frozen=True)
class Quality:
    """Score of one variant on the evaluation prompts of shapes world."""

    score: float
    score_low: float
    """Bootstrap 95 % interval over prompts."""
    score_high: float
    tasks: dict[str, float]
    images: int


@dataclass(frozen=True)
class Measured:
    """One variant's figures."""

    name: str
    folder: str
    runtime: str
    provider: str
    provider_why: str
    """Why it computed there."""
    memory_of: str
    """Whose memory the rows of memory.SPLIT are: `process` or `gpu`."""
    precision: str
    values: dict[str, float | int | None]
    """Keys of MEASURES; None where this system cannot measure it."""
    steps_s: list[float]
    """Every warm step."""
    images_s: list[float]
    how: dict[str, str]
    """How each memory row was measured."""
    quality: Quality | None = None


@dataclass(frozen=True)
class Comparison:
    """One variant against the first."""

    ratios: dict[str, float | None]
    """Keys `<stem>_ratio`: this variant's value divided by the first's."""
    step_p50_ratio_interval: tuple[float, float]
    """Bootstrap 95 % interval of step_p50_ratio over the warm steps of both."""
    psnr_db: float | None = None
    """Mean over images at equal prompts and seeds; None without quality. Equal images count as 100 dB."""
    score_drop: float | None = None
    """The first's score less this one's, as a share of the first's."""


@dataclass(frozen=True)
class BenchResult:
    """Everything a run found."""

    variants: list[Measured]
    comparisons: dict[str, Comparison]
    """By variant name, all but the first."""
    machine: dict[str, Any]
    settings: dict[str, Any]
    schema_version: int = field(default=SCHEMA_VERSION)


def _silent(_: str) -> None:
    """No progress."""


def run(
    variants: Sequence[Variant],
    *,
    repeats: int = 20,
    warmup: int = 2,
    steps: int | None = None,
    prompt: str = PROMPT,
    quality: int = 0,
    quality_seeds: int = 1,
    progress: Progress = _silent,
) -> BenchResult:
    """Measure each variant in a process of its own, one after the other.

    Args:
        variants: the first is the reference of the ratios.
        repeats: warm steps timed.
        warmup: steps run and not counted between the first and the timed ones.
        steps: denoising steps of a full image; None for the folder's default.
        prompt: of the timed image.
        quality: held-out prompts per task of shapes world to score on; 0 for no scoring.
        quality_seeds: images per such prompt.
        progress: called with a line of text now and then.

    Raises:
        InputError: no variant, equal names, repeats below 1, or a folder that cannot be used.
        EdgepruneError: a worker died.
    """
    names = [v.name for v in variants]
    if not names or len(set(names)) != len(names):
        raise InputError(f"variants: found {names}, expected at least one, with different names")
    for option, value, low in (
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("quality", quality, 0),
        ("quality_seeds", quality_seeds, 1),
        ("steps", 1 if steps is None else steps, 1),
    ):
        if value < low:
            raise InputError(f"{option}: found {value}, expected {low} or more")
    for variant in variants:  # before minutes of measuring the others
        runtimes.RUNTIMES[runtimes.choose(variant.folder, variant.runtime)].require()
    spec = {"repeats": repeats, "warmup": warmup, "steps": steps, "prompt": prompt}
    prompts: list[Any] = []
    if quality:
        from edgeprune import shapes

        prompts = [p for p in shapes.evaluation_prompts(quality) for _ in range(quality_seeds)]
    bandwidth = memory_bandwidth()
    measured: list[Measured] = []
    images: list[NDArray[np.uint8]] = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-bench-") as scratch:
        for variant in variants:
            progress(f"{variant.name}: {variant.folder}")
            path = Path(scratch) / f"{len(measured)}.npy"
            wanted = {"prompts": [p.text for p in prompts], "seeds": list(range(len(prompts))), "images": str(path)}
            found = _worker(variant, spec | wanted, progress)
            scored = None
            if prompts:
                images.append(np.load(path))
                scored = _score(images[-1], prompts)
            measured.append(_measured(variant, found, bandwidth, scored))
    comparisons = {
        m.name: compare(measured[0], m, psnr_db(images[0], images[i]) if images else None)
        for i, m in enumerate(measured)
        if i
    }
    settings = spec | {"quality_prompts_per_task": quality, "quality_seeds": quality_seeds}
    return BenchResult(measured, comparisons, machine(bandwidth), settings)


def _worker(variant: Variant, spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run one worker to its end and read its last line."""
    spec = spec | {
        "folder": str(variant.folder),
        "runtime": variant.runtime,
        "options": variant.options if variant.dtype is None else variant.options | {"dtype": variant.dtype},
    }
    command = [sys.executable, "-m", "edgeprune.bench.worker", json.dumps(spec)]
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, encoding="utf-8"
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                last = line
                if line.startswith('{"progress"'):
                    done, total = json.loads(line)["progress"]
                    progress(f"{variant.name}: {done} of {total} quality images")
        code = worker.returncode
        complaints.seek(0)
        tail = " | ".join(complaints.read().strip().splitlines()[-3:])
    try:
        found = json.loads(last)
    except ValueError:
        found = None
    if isinstance(found, dict) and "error" in found:
        kind = getattr(errors, found["kind"], EdgepruneError)
        # MissingExtraError builds its text from two names; its message is whole already.
        raise (InputError if kind is errors.MissingExtraError else kind)(f"{variant.name}: {found['error']}")
    if code != 0 or not isinstance(found, dict):
        raise EdgepruneError(f"{variant.name}: the worker ended with status {code}: {tail or 'no message'}")
    return found


def _measured(variant: Variant, found: dict[str, Any], bandwidth: float, quality: Quality | None) -> Measured:
    values: dict[str, float | int | None] = {k: found[k] for k in MEASURES if k in found}
    values |= disk_bytes(variant.folder)
    weights = weights_bytes(variant.folder, found["precision"])
    values["transformer_weights_bytes"] = weights
    values["step_floor_s"] = weights / bandwidth
    values["step_p50_s"], values["step_p95_s"] = (float(q) for q in np.quantile(found["steps_s"], [0.5, 0.95]))
    values["image_p50_s"] = float(np.median(found["images_s"]))
    return Measured(
        name=variant.name,
        folder=str(variant.folder),
        runtime=found["runtime"],
        provider=found["provider"],
        provider_why=found["provider_why"],
        memory_of=found["memory_of"],
        precision=found["precision"],
        values={k: values[k] for k in MEASURES},
        steps_s=found["steps_s"],
        images_s=found["images_s"],
        how=found["how"],
        quality=quality,
    )


# ------------------------------------------------------------------------------------------- bytes


def _weight_files(folder: Path) -> list[Path]:
    """The files of one component that its runtime loads: safetensors (no half-precision copies) or an export's."""
    patterns = ("model.onnx*", "openvino_model.*", "model.engine", "*.mlpackage/**/weight.bin")
    exported = [p for pattern in patterns for p in folder.glob(pattern) if p.is_file()]
    return exported or [p for p in folder.glob("*.safetensors") if not re.search(r"\.(fp16|bf16)\b", p.name)]


def _transformer(folder: Path) -> Path:
    packed = folder / "transformer_int4"
    return packed if packed.is_dir() else folder / "transformer"


def disk_bytes(folder: Path) -> dict[str, int]:
    """transformer_disk_bytes and total_disk_bytes of the files that generation reads."""
    transformer = sum(p.stat().st_size for p in _weight_files(_transformer(folder)))
    # An artefact's half-precision transformer is not read where there is an INT4 one.
    skipped = ("transformer", "transformer_int4", "cache")
    others = [d for d in folder.iterdir() if d.is_dir() and d.name not in skipped]
    rest = sum(p.stat().st_size for d in others for p in _weight_files(d))
    return {"transformer_disk_bytes": transformer, "total_disk_bytes": transformer + rest}


_PER_WEIGHT = {"bf16": 2, "fp32": 4}


def weights_bytes(folder: Path, precision: str) -> int:
    """The transformer's weights in the precision they are computed with; files may hold another.

    Raises:
        InputError: a safetensors file is damaged.
    """
    files = _weight_files(_transformer(folder))
    if precision not in _PER_WEIGHT or any(p.suffix != ".safetensors" for p in files):
        return sum(p.stat().st_size for p in files)
    return sum(_count(p) for p in files) * _PER_WEIGHT[precision]


def _count(path: Path) -> int:
    """Numbers in a safetensors file, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return sum(int(np.prod(file.get_slice(key).get_shape(), dtype=np.int64)) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: found {error}, expected a whole safetensors file") from None


# ------------------------------------------------------------------------------------- comparing


def compare(first: Measured, other: Measured, psnr: float | None, *, draws: int = 2000, seed: int = 0) -> Comparison:
    """Ratios other / first; none of the process's memory to a GPU's."""
    ratios: dict[str, float | None] = {}
    for key, (_, stem) in MEASURES.items():
        mine, theirs = other.values[key], first.values[key]
        alike = key not in memory.SPLIT or other.memory_of == first.memory_of
        ratios[f"{stem}_ratio"] = mine / theirs if alike and mine is not None and theirs else None
    rng = np.random.default_rng(seed)

    def medians(times: list[float]) -> NDArray[np.float64]:
        values = np.asarray(times)
        return np.asarray(np.median(values[rng.integers(0, len(values), (draws, len(values)))], axis=1))

    low, high = np.quantile(medians(other.steps_s) / medians(first.steps_s), [0.025, 0.975])
    drop = None
    if first.quality and other.quality and first.quality.score > 0:
        drop = 1 - other.quality.score / first.quality.score
    return Comparison(ratios, (float(low), float(high)), psnr, drop)


def psnr_db(first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float | None:
    """Mean over images of the peak signal-to-noise ratio; (P, H, W, 3) both. None if their sizes differ."""
    if first.shape != other.shape:
        return None
    return mean_decibels(list(first), list(other))


def _score(images: NDArray[np.uint8], prompts: list[Any]) -> Quality:
    from edgeprune import shapes

    if images.shape[1:] != (shapes.SIZE, shapes.SIZE, 3):
        raise InputError(f"quality: found images of {images.shape[1:3]}, expected {shapes.SIZE}x{shapes.SIZE}")
    right = [shapes.check(image, prompt.meaning) for image, prompt in zip(images, prompts, strict=True)]
    # Seeds of one prompt are not independent: the bootstrap is over prompts.
    by_prompt: dict[str, list[bool]] = {}
    for prompt, ok in zip(prompts, right, strict=True):
        by_prompt.setdefault(prompt.text, []).append(ok)
    task_of = {p.text: p.meaning.task for p in prompts}
    values, tasks = np.asarray([np.mean(v) for v in by_prompt.values()]), [task_of[t] for t in by_prompt]
    mean, low, high = shapes.score(values, tasks)
    return Quality(mean, low, high, shapes.task_means(values, tasks), len(images))


# --------------------------------------------------------------------------------------- machine


def memory_bandwidth(size_bytes: int = 128_000_000, repeats: int = 5) -> float:
    """Bytes per second, read and written, of numpy copying one array to another; the best of `repeats`."""
    source = np.ones(size_bytes // 8)
    target = np.empty_like(source)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times[1:])


def machine(bandwidth: float) -> dict[str, Any]:
    """Where it ran."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = found[1]
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "memory_bandwidth_bytes_per_s": bandwidth,
    }


# ---------------------------------------------------------------------------------------- output


def to_json(result: BenchResult) -> dict[str, Any]:
    """Plain values for json.dump; docs/bench.md describes them."""
    return {
        "schema_version": result.schema_version,
        "machine": result.machine,
        "settings": result.settings,
        "variants": [
            {k: v for k, v in vars(m).items() if k not in ("values", "quality")}
            | m.values
            | {"quality": vars(m.quality) if m.quality else None}
            for m in result.variants
        ],
        "comparisons": {
            name: c.ratios
            | {
                "step_p50_ratio_interval": list(c.step_p50_ratio_interval),
                "psnr_db": c.psnr_db,
                "score_drop": c.score_drop,
            }
            for name, c in result.comparisons.items()
        },
    }


def load(path: Path) -> dict[str, Any]:
    """The JSON of a bench, as `to_json` makes it.

    Raises:
        InputError: it is none.
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
    for variant in variants:
        for name in ("name", "runtime", "precision"):
            fields.text(variant, name, f"{path}: variants")
    numbers = [(v, key) for v in variants for key in MEASURES]
    numbers += [(c, f"{stem}_ratio") for c in comparisons.values() for _, stem in MEASURES.values()]
    for row, key in numbers:
        if not isinstance(row.get(key), (int, float, NoneType)):
            raise InputError(f"{path}: {key}: found {fields.shown(row[key])}, expected a number or null")
    return data


def show(key: str, value: float | int | None) -> str:
    """A value for people: GB and MB are 10^9 and 10^6 bytes."""
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def table(result: BenchResult) -> Table:
    """A rich table: one row per measure, one column per variant, one ratio column per comparison."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=f"{result.machine['cpu']}, {result.machine['cores']} cores")
    out.add_column("")
    for m in result.variants:  # the name is a folder's: no markup
        out.add_column(
            Text(printable(f"{m.name}\n{m.runtime} {m.precision} {m.provider}")), justify="right", overflow="fold"
        )
    for name in result.comparisons:
        out.add_column(Text(printable(f"{name} /\n{result.variants[0].name}")), justify="right")
    out.add_row("why this provider", *(m.provider_why for m in result.variants), *[""] * len(result.comparisons))
    for key, (label, stem) in MEASURES.items():
        ratios = [c.ratios[f"{stem}_ratio"] for c in result.comparisons.values()]
        cells = ["-" if r is None else f"{r:.3f}" for r in ratios]
        out.add_row(label, *(show(key, m.values[key]) for m in result.variants), *cells)
    if any(m.quality for m in result.variants):
        scores = [
            f"{q.score:.3f} [{q.score_low:.3f}, {q.score_high:.3f}]" if (q := m.quality) else "-"
            for m in result.variants
        ]
        drops = ["-" if c.score_drop is None else f"drop {c.score_drop:.1%}" for c in result.comparisons.values()]
        out.add_row("score, 95 % interval", *scores, *drops)
        psnrs = ["-" if c.psnr_db is None else f"{c.psnr_db:.1f} dB" for c in result.comparisons.values()]
        out.add_row("PSNR at equal seeds", *[""] * len(result.variants), *psnrs)
    return out


# ------------------------------------------------------------------------------------- assertions

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_EXPRESSION = re.compile(r"\s*([^\s<>=]+?)\s*(<=|>=|==|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


def figures(result: BenchResult) -> dict[str, float | None]:
    """What an assertion may name: `peak_ratio` (second variant against the first), `NAME.peak_ratio`, `NAME.load_s`."""
    out: dict[str, float | None] = {}
    for m in result.variants:
        out |= {f"{m.name}.{key}": value for key, value in m.values.items()}
        if m.quality:
            out[f"{m.name}.score"] = m.quality.score
    for i, (name, c) in enumerate(result.comparisons.items()):
        found: dict[str, float | None] = {**c.ratios, "psnr_db": c.psnr_db, "score_drop": c.score_drop}
        out |= {f"{name}.{key}": value for key, value in found.items()}
        if i == 0:
            out |= found
    return out


def parse_expression(text: str) -> tuple[str, str, float]:
    """`peak_ratio<=0.25` to its name, operator and number.

    Raises:
        InputError: it is not of this form.
    """
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise InputError(f"--assert: found {text!r}, expected NAME OP NUMBER, such as 'peak_ratio<=0.25'")
    return match[1], match[2], float(match[3])


def assert_expressions(result: BenchResult, expressions: Sequence[str]) -> None:
    """Hold the result against bounds; all misses are told together.

    Raises:
        InputError: an expression is malformed, names nothing known, or names what was not measured here.
        AssertionMissedError: one does not hold.
    """
    known = figures(result)
    missed = []
    for text in expressions:
        name, op, bound = parse_expression(text)
        if name not in known:
            short = sorted(k for k in known if "." not in k) or sorted(known)
            raise InputError(f"--assert: {name}: unknown, expected one of {', '.join(short)}, or VARIANT.MEASURE")
        value = known[name]
        if value is None:
            raise InputError(f"--assert: {name}: was not measured in this run")
        if not _OPERATORS[op](value, bound):
            missed.append(f"{name} is {value:.6g}, not {op} {bound:g}")
    if missed:
        raise AssertionMissedError("; ".join(missed))
