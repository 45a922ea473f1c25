"""The table of docs/memory.md: what each stage of an image takes of the memory, within several limits.

    python -m edgeprune.experiments.stage_peaks EXPORT --memory 2GB 4GB --size 1024 [--write docs/memory.md]

Every limit is tried in a process of its own. Before each stage the process lets the kernel forget its peak
(/proc/self/clear_refs), so Linux is needed. The first prompt of the held-out captions is drawn. With --write the limits
of the model and size that has most of them are drawn as a plot, too, next to the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import runtimes
from edgeprune.bench.machine import machine
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json, write_json
from edgeprune.common.memory import parse_bytes
from edgeprune.common.splits import Split
from edgeprune.common.tables import markdown_table
from edgeprune.experiments.pages import insert
from edgeprune.runtimes.memory import parse_kib
from edgeprune.runtimes.modulation import ROWS
from edgeprune.runtimes.networks import NetworkBackend
from edgeprune.sampling.prompts import prompts

RESULTS = Path("docs/memory.json")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STAGES = ("load", "text_encoder", "text_encoder_2", "text_encoder_3", ROWS, "transformer", "vae_decoder")


def measure(folder: Path, limit: int | None, size: int, steps: int) -> dict[str, Any]:
    """Return peak bytes and seconds of each stage in which this process draws an image.

    Args:
        folder: an export.
        limit: most bytes of the process; None for no wish.
        size: pixels of a side.
        steps: denoising steps.
    """
    peaks: dict[str, float] = {}
    seconds: dict[str, float] = {}

    def staged(stage: str, work: Any) -> Any:
        _CLEAR.write_text("5", encoding="ascii")
        start = time.perf_counter()
        out = work()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        peak = parse_kib(_STATUS.read_text(encoding="utf-8"))["VmHWM"]
        peaks[stage] = max(peaks.get(stage, 0), peak)
        return out

    options: dict[str, Any] = {} if limit is None else {"memory": limit}
    with staged("load", lambda: runtimes.load(folder, **options)) as model:
        backend = model.backend
        assert isinstance(backend, NetworkBackend)
        run, table = backend._run, backend._table

        def all_of(name: str, feeds: Any) -> Any:
            # Rows of the modulation are stored one call after the other, so they are measured where that is done.
            return run(name, feeds) if name == ROWS else staged(name, lambda: [*run(name, feeds)])

        backend._run = all_of  # type: ignore[method-assign]
        if table is not None:
            fill = table.fill
            table.fill = lambda keys, made: staged(ROWS, lambda: fill(keys, made))  # type: ignore[method-assign]
        (prompt,) = prompts(Split.HELD_OUT, 1)
        model.generate(prompt, steps=steps, height=size, width=size)
    return {"peaks": peaks, "seconds": seconds}


def _tried(folder: Path, memory: str, size: int, steps: int) -> dict[str, Any]:
    """Measure in a process of its own; of a limit that is refused, return why."""
    command = [sys.executable, "-m", "edgeprune.experiments.stage_peaks", str(folder), "--one"]
    command += ["--memory", memory, "--size", str(size), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the peaks by stage as Markdown, a row for each limit."""
    stages = [stage for stage in _STAGES if any(stage in entry.get("peaks", {}) for entry in entries)]
    rows = []
    for entry in sorted(entries, key=lambda one: (one["model"], one["size"], _limit(one["memory"]) or sys.maxsize)):
        start = [entry["model"], f"{entry['size']}x{entry['size']}", entry["memory"]]
        if "refused" in entry:
            rows.append([*start, *("" for _ in stages), "", entry["refused"]])
            continue
        peaks, seconds = entry["peaks"], entry["seconds"]
        cells = [f"{peaks[s] / 1e9:.2f} GB" if s in peaks else "" for s in stages]
        step = f"{seconds['transformer'] / entry['steps']:.0f} s" if "transformer" in seconds else ""
        rows.append([*start, *cells, f"**{max(peaks.values()) / 1e9:.2f} GB**", step])
    return markdown_table(["model", "pixels", "`--memory`", *stages, "peak", "step"], rows)


_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
"""Okabe and Ito's."""


def plot(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a plot of the peak by stage, with bars for each limit of the model and size that has most of them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = [entry for entry in entries if "peaks" in entry and _limit(entry["memory"]) is not None]
    kinds = Counter((entry["model"], entry["size"]) for entry in measured)
    (model, size), _ = kinds.most_common(1)[0]
    shown = [entry for entry in measured if (entry["model"], entry["size"]) == (model, size)]
    shown.sort(key=lambda entry: _limit(entry["memory"]) or 0)
    stages = [stage for stage in _STAGES if stage in shown[0]["peaks"]]
    width = 0.8 / len(shown)
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots()
    for index, (entry, colour) in enumerate(zip(shown, _COLOURS, strict=False)):
        places = [stage + (index - (len(shown) - 1) / 2) * width for stage in range(len(stages))]
        peaks = [entry["peaks"][stage] / 1e9 for stage in stages]
        axes.bar(places, peaks, 0.9 * width, color=colour, label=f"--memory {entry['memory']}")
        limit = (_limit(entry["memory"]) or 0) / 1e9
        axes.hlines(
            [limit] * len(places), [x - width / 2 for x in places], [x + width / 2 for x in places], colour, lw=1
        )
    axes.set_xticks(range(len(stages)), stages)
    axes.set(ylabel="peak of the process, GB", title=f"{model}, {size}x{size} pixels; lines are the limits")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "edgeprune"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.stage_peaks", description=__doc__)
    parser.add_argument("folder", type=Path, help="an export")
    parser.add_argument("--name", default="", help="of the model, for the table")
    parser.add_argument("--memory", nargs="+", default=["all"], help="limits such as 2GB; all sets none")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps")
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        (memory,) = args.memory
        try:
            print(json.dumps(measure(args.folder, _limit(memory), args.size, args.steps)))
        except InputError as error:
            print(json.dumps({"refused": str(error)}))
        return
    kept = read_json(RESULTS) if RESULTS.exists() else {"entries": []}
    cpu = machine(0.0)["cpu"]
    for memory in args.memory:
        key = {"model": args.name or args.folder.name, "size": args.size, "steps": args.steps, "memory": memory}
        found = key | {"cpu": cpu} | _tried(args.folder, memory, args.size, args.steps)
        others = [e for e in kept["entries"] if not {*key.items(), ("cpu", cpu)} <= {*_plain(e)}]
        kept = {"entries": [*others, found]}
        write_json(RESULTS, kept)
        print(table([found]))
    if args.write:
        insert(args.write, table(kept["entries"]))
        plot(kept["entries"], args.write.with_suffix(".svg"))


def _limit(memory: str) -> int | None:
    """Return the bytes of a limit; None for `all`."""
    return None if memory == "all" else parse_bytes(memory, "--memory")


def _plain(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in entry.items() if not isinstance(value, dict)]


if __name__ == "__main__":
    main()
