"""Measures time and peak memory of every stage on models of 2 to 12 G parameters with random weights.

    python -m edgeprune.experiments.full_size --out build/full-size

Each stage is a process of its own, with the command that a user would type. Its peak memory is the kernel's
(ru_maxrss); if it starts other processes, the largest sum sampled over all of them counts where that is more.
OUT/results.json keeps the results row by row, so an interrupted run resumes; `--write FILE` puts the table between the
marks of a page. Takes an hour and a half on two cores, 70 GB of disk and 20 GB of memory. Random weights say nothing
about image quality, so it is not measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import typer

from edgeprune.bench.run import Variant, originals
from edgeprune.bench.run import run as run_bench
from edgeprune.common.files import read_json, write_json
from edgeprune.common.tables import markdown_table
from edgeprune.experiments.pages import insert
from edgeprune.export.folder import FILE as EXPORT
from edgeprune.families.published import transformers

BLOCKS = "25-28,31-34"
"""The eight blocks that the published plan removes from SD3.5 Large Turbo."""
MORE_BLOCKS = "8-28"
"""Twenty-one blocks, to time a step of the other seventeen; such a model would hardly draw well."""
_ISA = "ONEDNN_MAX_CPU_ISA"
_EVERY_S = 1.0


@dataclass(frozen=True)
class Stage:
    """Time and memory of one process and those that it started."""

    seconds: float
    peak_bytes: int


def run(*arguments: str) -> Stage:
    """Run `edgeprune …` in a process of its own.

    Raises:
        SystemExit: the command failed; it has printed its own message.
    """
    print("$ edgeprune", *arguments, flush=True)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "edgeprune.cli", *arguments])
    with memory_samples(process.pid) as samples:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"edgeprune {arguments[0]} ended with {code}")
    return Stage(seconds, max(*samples, usage.ru_maxrss * 1024))


@contextlib.contextmanager
def memory_samples(pid: int) -> Iterator[list[int]]:
    """Sample `resident_bytes` of a process once a second into a list that grows until the block ends."""
    samples, end = [0], threading.Event()

    def watch() -> None:
        while not end.wait(_EVERY_S):
            samples.append(resident_bytes(pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        end.set()
        watcher.join()


def resident_bytes(pid: int) -> int:
    """Return the bytes in memory of a process and all that it started; 0 if it has ended.

    Memory that processes share counts once for each.
    """
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended after it was listed
                total += each.memory_info().rss
    return total


class Table:
    """The measured rows, kept on disk."""

    def __init__(self, out: Path) -> None:
        self.out, self._path = out, out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = read_json(self._path) if self._path.is_file() else {}

    def stage(self, name: str, *arguments: str, file: str | None = None) -> None:
        """Measure a command unless that is done; also note the bytes of `file`, which it wrote."""
        if name in self.rows:
            return
        stage = run(*arguments)
        row: dict[str, Any] = {"seconds": round(stage.seconds, 1), "peak_bytes": stage.peak_bytes}
        if file is not None:
            row["file_bytes"] = sum(p.stat().st_size for p in _files(Path(file)))
        self.note(name, row)

    def remark(self, name: str, text: Callable[[], str]) -> None:
        """Add a remark to a row unless it has one."""
        if "said" not in self.rows[name]:
            self.note(name, self.rows[name] | {"said": text()})

    def note(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row on disk and print it."""
        self.rows[name] = row
        write_json(self._path, self.rows)
        print(json.dumps({name: row}), flush=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def _build(engines: Path) -> str:
    built = read_json(engines / EXPORT)["networks"]["transformer"]
    share = built["engine_bytes"] / built["onnx_weight_bytes"]
    return f"{built['build_s']:.0f} s of that is the build; the engine has {share:.3f} times the bytes of its weights"


def compressed(table: Table, label: str, source: Path, *options: str) -> Path:
    """Prune and quantize a model; return the artefact."""
    artefact = table.out / label
    table.stage(f"{label}: prune and INT4", "compress", str(source), "-o", str(artefact), "--steps", "0", *options)
    for shard in (artefact / "transformer").glob("*.safetensors"):
        shard.unlink()  # nothing reads the half-precision weights again
    return artefact


def onnx(table: Table, artefact: Path) -> None:
    """Export an artefact to ONNX."""
    out = Path(f"{artefact}-onnx")
    table.stage(
        f"{artefact.name}: ONNX", "export", str(artefact), "--target", "onnx", "-o", str(out),
        file=str(out / "transformer"),
    )  # fmt: skip


def remove(table: Table, *labels: str) -> None:
    """Free disk space: delete the folders of exactly these names and their exports."""
    for label in labels:
        for suffix in ("", "-onnx", "-openvino", "-prepared", "-trt", "-coreml"):
            shutil.rmtree(table.out / f"{label}{suffix}", ignore_errors=True)


def plans(table: Table) -> None:
    """Measure a plan from each config alone."""
    for name, config in transformers().items():
        path = table.out / f"{name}.json"
        write_json(path, config)
        table.stage(f"{name}: plan from config", "plan", "--config", str(path), "--method", "manual", "--blocks", "5-8")


def steps(table: Table, source: Path, label: str, *, ort: bool) -> None:
    """Measure one denoising step in OpenVINO, with `ort` also in ONNX Runtime, against the original."""
    name = f"{label}: one step"
    if name in table.rows:
        return
    folder = str(table.out / label)
    table.stage(
        f"{label}: OpenVINO", "export", folder, "--target", "openvino", "-o", f"{folder}-openvino",
        file=f"{folder}-openvino/transformer",
    )  # fmt: skip
    exported, ir, prepared = (Path(f"{folder}-{kind}") for kind in ("onnx", "openvino", "prepared"))
    if ort:
        table.stage(
            f"{label}: ONNX Runtime prepares its weights", "generate", "a lake", "--model", str(exported), "--runtime",
            "ort", "--low-memory", "--cache-dir", str(prepared), "--steps", "1", "--height", "64", "--width", "64",
            "-o", f"{folder}-image.png", file=str(prepared),
        )  # fmt: skip
    variants = [
        *originals(source),
        Variant("OpenVINO", ir, "openvino", options={"low_memory": True}),
        Variant(
            "OpenVINO, dynamic quantization", ir, "openvino",
            options={"low_memory": True, "dynamic_quantization": True},
        ),
    ]  # fmt: skip
    if ort:
        variants += [
            Variant("ONNX Runtime", exported, "ort", options={"low_memory": True}),
            Variant(
                "ONNX Runtime, weights prepared",
                exported,
                "ort",
                options={"low_memory": True, "cache_dir": str(prepared)},
            ),
        ]
    table.note(name, measured(variants, repeats=3))


def without_bf16(table: Table, source: Path, label: str) -> None:
    """Measure a step as on processors that have int8 dot products but no bf16, by restricting oneDNN's instructions.

    OpenVINO ignores that variable, so it gets the ONNX folder, which it computes in float32 and int8.
    """
    name = f"{label}: one step without the processor's bf16 (the original's is emulated)"
    if name in table.rows:
        return
    variants = [
        *originals(source),
        Variant(
            "OpenVINO, dynamic quantization, float32", table.out / f"{label}-onnx", "openvino",
            options={"low_memory": True, "dynamic_quantization": True},
        ),
    ]  # fmt: skip
    os.environ[_ISA] = "AVX512_CORE_VNNI"
    try:
        table.note(name, measured(variants, repeats=1))
    finally:
        del os.environ[_ISA]


def measured(variants: list[Variant], *, repeats: int) -> dict[str, dict[str, Any]]:
    """Run a bench and return its figures by variant."""
    result = run_bench(variants, repeats=repeats, warmup=0, steps=1, progress=print)
    keys = ("load_s", "first_step_s", "step_p50_s", "peak_bytes", "anon_bytes", "file_bytes")
    first, *others = result.variants
    named = {f"original, torch {v.precision}": v for v in (first, *result.slower_originals)}
    named |= {v.name: v for v in others}
    return {name: {key: v.values[key] for key in keys} for name, v in named.items()}


def sd35_large(table: Table) -> None:
    """Measure SD3.5 Large less 8 blocks, with projected modulation, with both in INT4 groups of 128, less 21 blocks."""
    source = table.out / "sd3.5-large"
    table.stage("sd3.5-large: synth", "synth", "sd3.5-large", "--tiny-encoders", "-o", str(source))
    artefact = compressed(table, "large-8", source, "--blocks", BLOCKS)
    onnx(table, artefact)
    steps(table, source, "large-8", ort=True)
    table.stage(
        "large-8: TensorRT-RTX", "export", str(artefact), "--target", "trt", "--device", "rtx",
        "-o", f"{artefact}-trt", file=f"{artefact}-trt/transformer",
    )  # fmt: skip
    table.remark("large-8: TensorRT-RTX", lambda: _build(Path(f"{artefact}-trt")))
    table.stage(
        "large-8: Core ML", "export", str(artefact), "--target", "coreml", "--device", "iphone-15-pro",
        "-o", f"{artefact}-coreml", file=f"{artefact}-coreml/transformer",
    )  # fmt: skip
    remove(table, "large-8")
    rank = ("--method", "manual", "--modulation-rank", "256")
    onnx(table, compressed(table, "large-r256", source, *rank))
    remove(table, "large-r256")
    onnx(table, compressed(table, "large-8-r256-g128", source, *rank, "--blocks", BLOCKS, "--group-size", "128"))
    steps(table, source, "large-8-r256-g128", ort=False)
    without_bf16(table, source, "large-8-r256-g128")
    remove(table, "large-8-r256-g128")
    compressed(table, "large-21-r256-g128", source, *rank, "--blocks", MORE_BLOCKS, "--group-size", "128")
    steps(table, source, "large-21-r256-g128", ort=False)
    remove(table, "large-21-r256-g128", source.name)


def flux_schnell(table: Table) -> None:
    """Measure FLUX.1 schnell with INT4 alone."""
    source = table.out / "flux.1-schnell"
    table.stage("flux.1-schnell: synth", "synth", "flux.1-schnell", "--tiny-encoders", "-o", str(source))
    onnx(table, compressed(table, "flux", source, "--method", "manual"))
    remove(table, "flux", source.name)


PARTS: dict[str, Callable[[Table], None]] = {
    "plans": plans,
    "sd35-large": sd35_large,
    "flux-schnell": flux_schnell,
}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return the tables of the page."""
    stages = {name: row for name, row in rows.items() if "seconds" in row}
    lines = []
    for name, row in stages.items():
        size = f"{row['file_bytes'] / 1e9:.2f} GB" if "file_bytes" in row else ""
        label = f"{name} ({row['said']})" if "said" in row else name
        lines.append((label, f"{row['seconds']:.4g} s", f"{row['peak_bytes'] / 1e9:.2f} GB", size))
    parts = [
        f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}",
        markdown_table(("what", "time", "peak memory", "file"), lines),
    ]
    for name, row in rows.items():
        if name not in stages:
            parts += [f"{name}:", _bench_table(row)]
    return "\n\n".join(parts)


def _bench_table(row: dict[str, Any]) -> str:
    """Return the figures of one bench by runtime, against the first."""
    first = next(iter(row.values()))
    lines = []
    for runtime, values in row.items():
        faster, smaller = first["step_p50_s"] / values["step_p50_s"], values["peak_bytes"] / first["peak_bytes"]
        lines.append(
            (
                runtime,
                f"{values['step_p50_s']:.1f} s",
                f"{faster:.2f} times faster",
                f"{values['load_s']:.0f} s",
                f"{values['peak_bytes'] / 1e9:.2f} GB",
                f"{smaller:.3f}",
            )
        )
    return markdown_table(("runtime", "step", "against the original", "load", "peak", "against"), lines)


def main(out: Path = Path("build/full-size"), only: str | None = None, write: Path | None = None) -> None:
    """Measure what is missing, print the table, and write it into a page if one is given."""
    table = Table(out)
    chosen: Sequence[str] = [only] if only else list(PARTS)
    for name in chosen:
        PARTS[name](table)
    print(markdown(table.rows))
    if write is not None:
        insert(write, markdown(table.rows))


if __name__ == "__main__":
    typer.run(main)
