"""A comparison as a table for people, as Markdown, and as a plot: SVG and PNG.

What it leaves out: measuring (compare.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.bench.measure import show
from edgeprune.common.files import write_text

HEADINGS = (
    "row", "gone", "INT4 or half", "of bf16", "step", "score, 95 % interval", "relative drop", "lead of the reference",
)  # fmt: skip
# Okabe and Ito's palette, told apart by those who do not see red and green apart; shapes differ too.
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))


def cells(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table's rows, the original first."""
    whole = summary["original"]
    out: list[tuple[str, ...]] = [
        ("original", "", show("_bytes", whole["bytes"]), "1", "1", _interval(whole["score"]), "", "")
    ]
    for row in summary["rows"]:
        name = f"{row['name']} ({row['seeds']} seeds)" if row["seeds"] > 1 else row["name"]
        drop = "{:.1%} [{:.1%}, {:.1%}]".format(*row["relative_drop"]) if row["relative_drop"] else ""
        lead = "" if row["lead"] is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["lead"])
        out.append(
            (name, _gone(row), show("_bytes", row["bytes"]), f"{row['bytes_ratio']:.3f}", f"{row['step_ratio']:.2f}")
            + (_interval(row["score"]), drop, lead)
        )
    return out


def _gone(row: dict[str, Any]) -> str:
    parts = []
    if row["blocks"] is None:
        parts.append("other blocks for each seed")
    elif row["blocks"]:
        parts.append("blocks " + ", ".join(map(str, row["blocks"])))
    if row["components"]:
        parts.append(f"{row['components']} components")
    if row["modulation_rank"] is not None:
        parts.append(f"modulation to rank {row['modulation_rank']}")
    return "; ".join(parts) or "nothing"


def _interval(values: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def markdown(summary: dict[str, Any]) -> str:
    """The table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *cells(summary)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(summary: dict[str, Any], out: Path) -> list[Path]:
    """`compare.md`, `compare.svg` and `compare.png`."""
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
        axes.axhspan(low, high, color="0.92", lw=0)
        axes.axhline(mean, color="0.5", lw=1, label="original" if key == "bytes_ratio" else None)
        for group, (colour, marker) in zip(groups, _STYLES * (1 + len(groups) // len(_STYLES)), strict=False):
            rows = [row for row in summary["rows"] if row["group"] == group]
            values = [row["score"] for row in rows]
            errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
            axes.errorbar(
                [row[key] for row in rows], [v[0] for v in values], yerr=errors, fmt=marker, color=colour,
                capsize=2, ms=5, lw=1, label=(group or "rows") if key == "bytes_ratio" else None,
            )  # fmt: skip
        _name(axes, [(row[key], row["score"][0], row["name"]) for row in summary["rows"]])
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


def _name(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside points, pushed up where they would lie on each other."""
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
