"""The results of the study as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_STYLES = {
    "INT4 alone": ("#000000", "*"),
    "modulation only": ("#0072b2", "o"),
    "components only": ("#d55e00", "s"),
    "blocks only": ("#cc79a7", "v"),
    "modulation, then components": ("#009e73", "D"),
    "modulation, then blocks": ("#e69f00", "^"),
}
"""Okabe and Ito's colours, and a marker for each."""


def plot(results: dict[str, Any], path: Path) -> None:
    """Write a plot of error by rank, error by bytes and, where images were scored, score by bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    judged = any(_images(results, key) for key in results if key.startswith("variant "))
    figure = Figure(figsize=(15 if judged else 10.5, 4.2))
    by_rank, by_bytes, *scores = figure.subplots(1, 3 if judged else 2)
    _plot_ranks(by_rank, results)
    for series in _STYLES:
        for distilled in (False, True):
            _plot_series(by_bytes, scores, results, series, distilled)
    by_bytes.set(ylim=(0, None), xlabel="INT4 weights, MB", ylabel="relative velocity error, held-out prompts")
    by_bytes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # above: every corner is taken
    for axes in scores:
        axes.axhline(results["images teacher"]["score"][0], color="#000000", lw=1, ls=":", label="original")
        axes.set(xlabel="INT4 weights, MB", ylabel="score on held-out prompts, 95 % interval")
        axes.legend(fontsize=7)
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "modulation"}):
        figure.savefig(path, metadata={"Date": None})


def _images(results: dict[str, Any], key: str) -> Any:
    return results.get(f"images {key.removeprefix('variant ')}")


def _plot_ranks(axes: Any, results: dict[str, Any]) -> None:
    rows = {int(r): v for r, v in results["ranks"].items() if r != "full"}
    axes.plot(
        [max(r, 1) for r in rows], [v["float32"] for v in rows.values()], "o-", color="#0072b2", label="projected"
    )
    after = {r: v["int4"] for r, v in rows.items() if "int4" in v}
    axes.plot(list(after), list(after.values()), "s--", color="#d55e00", label="projected, all weights INT4")
    for label, value, colour, line in (
        ("INT4, nothing projected", results["ranks"]["full"]["int4"], "#000000", ":"),
        ("least important block removed", results["blocks"]["least"], "#cc79a7", "--"),
    ):
        axes.axhline(value, color=colour, lw=1, ls=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="relative velocity error, held-out prompts")
    axes.set_xticks([max(r, 1) for r in rows], [str(r) for r in rows])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def _plot_series(by_bytes: Any, scores: list[Any], results: dict[str, Any], series: str, distilled: bool) -> None:
    colour, marker = _STYLES[series]
    points = [
        (row["int4_bytes"] / 1e6, row["error"], _images(results, key))
        for key, row in results.items()
        if key.startswith("variant ") and (row["series"], row["distilled"]) == (series, distilled)
    ]
    style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "lw": 1, "ls": "-" if distilled else ":"}
    style |= {"mfc": colour if distilled else "white", "label": f"{series}{', distilled' if distilled else ''}"}
    if points:
        points.sort(key=lambda point: point[0])
        by_bytes.plot([size for size, *_ in points], [error for _, error, _ in points], **style)
    scored = [(size, *images["score"]) for size, _, images in points if images]
    for axes in scores if scored else []:
        size, centre, low, high = (np.array(column) for column in zip(*scored, strict=True))
        axes.errorbar(size, centre, [centre - low, high - centre], capsize=2, **style)
