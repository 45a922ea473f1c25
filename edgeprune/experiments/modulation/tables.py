"""The results of the study as tables in Markdown."""

from __future__ import annotations

from typing import Any

from edgeprune.common.tables import interval_text, markdown_table


def _grid(results: dict[str, dict[str, float]], corner: str) -> str:
    columns = list(dict.fromkeys(c for row in results.values() for c in row))
    rows = [[name, *(_number(row.get(c)) for c in columns)] for name, row in results.items()]
    return markdown_table([corner, *columns], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.4f}"


def tables(results: dict[str, Any]) -> str:
    """Return all tables."""
    parts = [
        f"{key}\n\n{_grid(results[key], key)}"
        for key in ("ranks", "calibration", "seen", "timesteps", "guidance")
        if key in results
    ]
    if "auto" in results:
        parts.append(
            markdown_table(
                ["captions", *results["auto"]], [["auto", *(str(r or "full") for r in results["auto"].values())]]
            )
        )
    if "storage" in results:
        parts.append(markdown_table(["rank 32", "error"], [[n, _number(v)] for n, v in results["storage"].items()]))
    head = ["", "rank", "removed", "INT4", "velocity error", "PSNR", "score, 95 % interval", "lost, won"]
    rows = []
    for name in dict.fromkeys(k.split(" ")[1] for k in results if k.startswith(("variant ", "images "))):
        sizes, images = results.get(f"variant {name}", {}), results.get(f"images {name}", {})
        row = [name, str(sizes.get("rank") or "full"), "", "", _number(sizes.get("error")), "", "", ""]
        if sizes:
            row[2] = f"{len(sizes['blocks'])} blocks, {sizes['components']} components"
            row[3] = f"{sizes['int4_bytes'] / 1e6:.2f} MB"
        if images:
            row[5] = f"{images['psnr_db']:.1f} dB"
            row[6:] = [interval_text(images["score"]), f"{images['lost']}, {images['won']}"]
        rows.append(row)
    parts.append(markdown_table(head, rows))
    return "\n\n".join(parts) + "\n"
