"""Shows a comparison as a table, as Markdown, and as a plot in SVG and PNG."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from edgeprune.common.files import write_text
from edgeprune.common.tables import interval_text, markdown_table, with_unit
from edgeprune.report.steps import ratio_text

HEADINGS = (
    "row", "removed", "INT4 or half", "of bf16", "step", "score, 95 % interval", "relative drop",
    "lead of the reference", "the reference",
)  # fmt: skip
NOTE = (
    "1 seed: the interval is over prompts only; another training seed may score differently. The reference `wins` "
    "or `loses` where the interval of its lead excludes 0, over prompts and the seeds of both rows, and where every "
    "single seed agrees. `one seed`: it excludes 0 over prompts, but a row ran with a single seed."
)
# Okabe and Ito's palette, which colour-blind readers can distinguish; the shapes differ too.
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))


def cells(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows under HEADINGS, the original first."""
    original = summary["original"]
    out: list[tuple[str, ...]] = [
        ("original", "", with_unit("_bytes", original["bytes"]), "1", "1", interval_text(original["score"]), *3 * ("",))
    ]
    if other := summary.get("reference_model"):
        drop = interval_text(other["relative_drop"], ".1%") if other["relative_drop"] else ""
        size, ratio = with_unit("_bytes", other["bytes"]), f"{other['bytes_ratio']:.3f}"
        out.append((f"{other['pipeline']}, as it is", "", size, ratio, "", interval_text(other["score"]), drop, "", ""))
    for row in summary["rows"]:
        seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "1 seed" if row["one_seed"] else ""
        said = ", ".join(filter(None, (seeds, f"{_range(row['steps'])} steps" if row["steps"] else "")))
        name = f"{row['name']} ({said})" if said else row["name"]
        out.append(
            (
                name,
                _removed(row),
                with_unit("_bytes", row["bytes"]),
                f"{row['bytes_ratio']:.3f}",
                ratio_text(row["step_ratio"], row["step_ratio_quartiles"]),
                interval_text(row["score"]),
                interval_text(row["relative_drop"], ".1%") if row["relative_drop"] else "",
                "" if row["lead"] is None else interval_text(row["lead"], "+.3f"),
                row["verdict"] or "",
            )
        )
    return out


def _range(steps: list[int]) -> str:
    """Return a number, or the least and the greatest of several: plans that are drawn differ by seed."""
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def _removed(row: dict[str, Any]) -> str:
    parts = []
    if row["blocks"] is None:
        parts.append("different blocks for each seed")
    elif row["blocks"]:
        parts.append("blocks " + ", ".join(map(str, row["blocks"])))
    if row["components"]:
        parts.append(f"{row['components']} components")
    if row["modulation_rank"] is not None:
        parts.append(f"modulation to rank {row['modulation_rank']}")
    return "; ".join(parts) or "nothing"


def markdown(summary: dict[str, Any]) -> str:
    """Return the table in Markdown, and below it what seeds and verdicts mean."""
    return f"{markdown_table(HEADINGS, cells(summary))}\n\n{textwrap.fill(NOTE, 118)}"


def write(summary: dict[str, Any], out: Path) -> list[Path]:
    """Write `compare.md`, `compare.svg` and `compare.png`; return their paths."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    groups = list(dict.fromkeys(row["group"] for row in summary["rows"]))
    for axes, key, label in zip(
        both,
        ("bytes_ratio", "step_ratio"),
        ("bytes of the weights, share of bf16", "time of a step, share"),
        strict=True,
    ):
        mean, low, high = summary["original"]["score"]
        if low is not None:
            axes.axhspan(low, high, color="0.92", lw=0)
        axes.axhline(mean, color="0.5", lw=1, label="original" if key == "bytes_ratio" else None)
        for group, (colour, marker) in zip(groups, _STYLES * (1 + len(groups) // len(_STYLES)), strict=False):
            rows = [row for row in summary["rows"] if row["group"] == group]
            values = [row["score"] for row in rows]
            errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]] if low is not None else None
            axes.errorbar(
                [row[key] for row in rows], [v[0] for v in values], yerr=errors, fmt=marker, color=colour,
                capsize=2, ms=5, lw=1, label=(group or "rows") if key == "bytes_ratio" else None,
            )  # fmt: skip
        _label_points(axes, [(row[key], row["score"][0], row["name"]) for row in summary["rows"]])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    both[0].axvline(summary["budget"], color="0.5", lw=1, ls=":", label="budget")
    both[0].set_ylabel(f"score, {summary['prompts']} prompts")
    figure.legend(loc="outside upper center", ncols=len(groups) + 2, fontsize=8, frameon=False)
    paths = [out / f"compare.{kind}" for kind in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": "edgeprune"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    write_text(out / "compare.md", markdown(summary) + "\n")
    return [*paths, out / "compare.md"]


def _label_points(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Write names next to points, pushed up where they would overlap."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    line, room = (high - low) / 34, (right - left) / 5
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        at = y
        while any(abs(x - a) < room and abs(at - b) < line for a, b in placed):
            at += line / 4
        placed.append((x, at))
        axes.annotate(
            name, (x, y), (x + room / 16, at), fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "0.6"} if at != y else None,
        )  # fmt: skip
    axes.set_ylim(low, max(high, *(at + line for _, at in placed)))
    axes.set_xlim(left, right + room / 2)
