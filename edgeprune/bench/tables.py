"""A bench as a table: rows by measure, for the terminal and for the report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeprune.bench.results import MEASURES, BenchResult, Measured
from edgeprune.common.tables import NOT_MEASURED, interval_text, with_unit
from edgeprune.common.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table


class MeasureRow(NamedTuple):
    """One measure."""

    label: str
    values: list[str]
    """Of each variant, with its unit."""
    ratios: list[float | None]
    """Of each comparison."""


def measure_rows(variants: Sequence[Mapping[str, Any]], comparisons: Iterable[Mapping[str, Any]]) -> list[MeasureRow]:
    """Return a row for each of MEASURES.

    Args:
        variants: values by key of MEASURES.
        comparisons: ratios by `<stem>_ratio`.
    """
    compared = list(comparisons)
    return [
        MeasureRow(
            label=label,
            values=[with_unit(key, values.get(key)) for values in variants],
            ratios=[ratios.get(f"{stem}_ratio") for ratios in compared],
        )
        for key, (label, stem) in MEASURES.items()
    ]


def _plain(m: Measured) -> dict[str, Any]:
    return {"precision": m.precision, **m.values}


def table(result: BenchResult) -> Table:
    """Return a rich table: one row per measure, one column per variant, one ratio column per comparison."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=f"{result.machine['cpu']}, {result.machine['cores']} cores")
    out.add_column("")
    for m in result.variants:  # Text: a folder's name may look like markup
        out.add_column(
            Text(printable(f"{m.name}\n{m.runtime} {m.precision} {m.provider}")), justify="right", overflow="fold"
        )
    for name in result.comparisons:
        out.add_column(Text(printable(f"{name} /\n{result.variants[0].name}")), justify="right")
    out.add_row("why this provider", *(m.provider_why for m in result.variants), *[""] * len(result.comparisons))
    for row in measure_rows([m.values for m in result.variants], [c.ratios for c in result.comparisons.values()]):
        out.add_row(row.label, *row.values, *(NOT_MEASURED if r is None else f"{r:.3f}" for r in row.ratios))
    if any(m.quality for m in result.variants):
        scores = [
            interval_text((q.score, q.score_low, q.score_high)) if (q := m.quality) else NOT_MEASURED
            for m in result.variants
        ]
        compared = result.comparisons.values()
        drops = [NOT_MEASURED if c.score_drop is None else f"drop {c.score_drop:.1%}" for c in compared]
        out.add_row("score, 95 % interval", *scores, *drops)
        psnrs = [NOT_MEASURED if c.psnr_db is None else f"{c.psnr_db:.1f} dB" for c in compared]
        out.add_row("PSNR at equal seeds", *[""] * len(result.variants), *psnrs)
    if result.slower_originals:
        out.caption = baseline_text(_plain(result.variants[0]), map(_plain, result.slower_originals))
    return out


def way_rows(result: BenchResult) -> list[tuple[str, ...]]:
    """Return the way as rows of a table: the original, then each change on top of those before it."""
    head = ("", "image, p50", "ratio", "peak", "ratio", "score, 95 % interval", "relative drop", "PSNR, dB")
    rows: list[tuple[str, ...]] = [head]
    for m in result.variants:
        c = result.comparisons.get(m.name)
        time, peak = (with_unit(key, m.values[key]) for key in ("image_p50_s", "peak_bytes"))
        ratios = [c.ratios[name] if c else 1.0 for name in ("image_ratio", "peak_ratio")]
        fast, small = (NOT_MEASURED if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        score = interval_text((q.score, q.score_low, q.score_high)) if (q := m.quality) else NOT_MEASURED
        drop = psnr = ""
        if c is not None:
            low, high = c.score_drop_interval or (None, None)
            drop = NOT_MEASURED if c.score_drop is None else interval_text((c.score_drop, low, high), ".1%")
            psnr = NOT_MEASURED if c.psnr_db is None else f"{c.psnr_db:.1f}"
        name = f"{m.name} ({m.runtime}, {m.precision})" if c is None else f"+ {m.name} ({m.precision})"
        rows.append((name, time, fast, peak, small, score, drop, psnr))
    return rows


def baseline_text(reference: Mapping[str, Any], slower: Iterable[Mapping[str, Any]]) -> str:
    """Return which precision of the original the ratios refer to, with the figures of the slower ones.

    Args:
        reference: the first variant, as in the JSON of a bench.
        slower: its `slower_originals`.
    """

    def figures(variant: Mapping[str, Any]) -> str:
        step, peak = (with_unit(key, variant.get(key)) for key in ("step_p50_s", "peak_bytes"))
        return f" In {variant['precision']} it takes {step} per step here and peaks at {peak}."

    baseline = f"Ratios of time are against the original in {reference['precision']}, those of bytes against the least."
    return baseline + "".join(map(figures, slower))
