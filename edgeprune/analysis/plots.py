"""Draw the contributions of a report like figures 3 and 4 of HierarchicalPrune, as SVG and PNG with reproducible bytes.

The figure `contributions` has a panel for whole blocks and one for each component type. The figure `joint` has a panel
for each set of components that was removed together. The colours are Okabe and Ito's, which colour-blind readers can
distinguish, and no colour carries meaning alone. Pairs of parts in different blocks are not drawn: there are thousands.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.analysis.contribution import TOGETHER, Contribution, ContributionReport, Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
LINEAR = 1e-2
"""The axis is linear below this drop, which is noise for most metrics, and logarithmic above."""
_DPI = 144
_STYLE = {"svg.hashsalt": "edgeprune", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def figures(report: ContributionReport, removed: Group = ()) -> dict[str, Callable[[], Figure]]:
    """Return a function that draws each figure of a report, by file name.

    Args:
        removed: parts that a plan removes; their bars are hatched.
    """
    singles, joint = report.contributions(), report.joint()
    panels: dict[str, list[Contribution]] = {}
    for (_, component), contribution in singles.items():
        panels.setdefault(component or "block", []).append(contribution)
    together: dict[str, list[Contribution]] = {}
    for names in dict.fromkeys(names for sets in TOGETHER.values() for names in sets):
        members = [c for parts, c in joint.items() if _inside_a_block(parts) and {n for _, n in parts} == set(names)]
        if members:
            together[" + ".join(names)] = members
    intervals = ", 95 % interval" if any(c.half_width is not None for c in singles.values()) else ""
    single = f"loss of the {report.metric} score without a part{intervals}"
    several = f"loss of the {report.metric} score without a group of components{intervals}"
    drawn = {"contributions": lambda: _draw(panels, single, report, removed)}
    return drawn | ({"joint": lambda: _draw(together, several, report, removed, singles)} if together else {})


def save(report: ContributionReport, out: Path) -> list[Path]:
    """Write every figure of a report to a folder as SVG and PNG; return the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in figures(report).items():
        with _style():
            figure = draw()
            for ending, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                files.append(out / f"{name}.{ending}")
                figure.savefig(files[-1], dpi=_DPI, metadata=metadata)
    return files


def svg(draw: Callable[[], Figure]) -> bytes:
    """Return a figure as SVG."""
    buffer = io.BytesIO()
    with _style():
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _style() -> Any:
    """Return a context with the same style whatever the user's matplotlibrc says."""
    from matplotlib import style

    return style.context(["default", _STYLE])


def _inside_a_block(parts: Group) -> bool:
    """Return whether a group consists of components of one block."""
    return len({block for block, _ in parts}) == 1 and None not in {component for _, component in parts}


def _draw(
    panels: dict[str, list[Contribution]],
    label: str,
    report: ContributionReport,
    removed: Group,
    singles: dict[tuple[int, str | None], Contribution] | None = None,
) -> Figure:
    """Draw a row of bars per panel, one per block, on one scale. With `singles`, mark the sum of each group's parts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(6.5, 0.16 * report.num_blocks + 1.5), 1.15 * len(panels) + 0.7), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, members) in zip(rows, panels.items(), strict=True):
        blocks = [c.block for c in members]
        gone = [all(part in removed or (part[0], None) in removed for part in c.parts) for c in members]
        known = all(c.half_width is not None for c in members)
        axes.bar(
            blocks, [c.drop for c in members], yerr=[c.half_width for c in members] if known else None, width=0.7,
            color=[ORANGE if g else BLUE for g in gone], hatch=["////" if g else "" for g in gone], capsize=1.5,
            edgecolor="white", linewidth=0, error_kw={"elinewidth": 0.8, "ecolor": BLACK},
        )  # fmt: skip
        if singles is not None:
            sums = [sum(singles[part].drop for part in c.parts) for c in members]
            axes.plot(blocks, sums, ls="", marker="_", ms=9, mew=1.5, color=ORANGE, label="sum of its parts alone")
        axes.axhline(0, color=BLACK, lw=0.6)
        axes.set_title(
            name, loc="left", fontsize=8, pad=2, parse_math=False
        )  # the name comes from a file and is not a formula
        axes.set_yscale("symlog", linthresh=LINEAR)
    rows[-1].set(xlabel="block", xlim=(-0.7, report.num_blocks - 0.3))
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if singles is not None:
        rows[0].legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=7, frameon=False, borderaxespad=0)
    figure.suptitle(label, x=0.01, ha="left", fontsize=8, parse_math=False)
    return figure
