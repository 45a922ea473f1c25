"""The results of a study as table, plot, JSON and CSV.

They are mean opinion scores or preferences with intervals, tests, and agreement; statistics.py has the formulas. Raters
who missed an attention check do not count; raters who stopped midway count with what they answered.
"""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.files import cannot_write, write_json
from edgeprune.common.tables import interval_text
from edgeprune.common.terminal import printable
from edgeprune.user_study.design import QUESTIONS, SCALE, Study, conditions
from edgeprune.user_study.store import FILE, Answer, Rater, Store

with needs("study"):
    from edgeprune.user_study.statistics import Floats, Ratings, alpha, bootstrap, holm, interval, paired_test, sampled

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = {
    "mos": ("variant", "question", "answers", "mos", "drop", "relative_drop", "p_raters", "p_prompts"),
    "pairs": ("variant", "question", "answers", "preferred", "over", "p_raters", "p_prompts"),
}
_P = {"p_raters": "p, raters", "p_prompts": "p, prompts"}
_SHOWN = {
    "mos": {"variant": "variant", "mos": "MOS", "relative_drop": "drop", **_P},
    "pairs": {"variant": "variant", "preferred": "preferred", "over": "over", **_P},
}
PALETTE = {"quality": "#0072b2", "alignment": "#d55e00"}


@dataclass(frozen=True)
class Collected:
    """All answers of a study, and which raters count."""

    study: Study
    raters: list[Rater]
    answers: list[Answer]
    excluded: frozenset[int]
    """Numbers of raters who missed an attention check."""


def gather(study: Study, folder: Path) -> Collected:
    """Read the answers of a study's folder.

    Raises:
        InputError: there are no answers, none that count, or the file is damaged.
    """
    if not (folder / FILE).is_file():
        raise InputError(f"{folder / FILE}: no such file; begin with: edgeprune study serve {folder}")
    store = Store(folder)
    try:
        raters, answers = store.raters(), store.answers()
        valid = all(_is_valid(study, raters, a) for a in answers)
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{folder / FILE}: not readable as answers ({error})") from error
    finally:
        store.close()
    if not valid:
        raise InputError(f"{folder / FILE}: an answer does not fit this study; the file is damaged or of another study")
    missed = {a.rater for a in answers if not _passed(raters[a.rater], a)}
    collected = Collected(study=study, raters=raters, answers=answers, excluded=frozenset(missed))
    if not any(_counts(collected, a) for a in answers):
        why = (
            f"all {len(missed)} raters who answered missed an attention check" if missed else "nobody has answered yet"
        )
        raise InputError(f"{folder / FILE}: no answers to count: {why}")
    return collected


def _is_valid(study: Study, raters: list[Rater], answer: Answer) -> bool:
    """Return whether an answer belongs to a trial that a rater of this study can have."""
    if (
        type(answer.rater) is not int
        or not 0 <= answer.rater < len(raters)
        or raters[answer.rater].number != answer.rater
    ):
        return False
    trials = raters[answer.rater].trials
    if type(answer.trial) is not int or not 0 <= answer.trial < len(trials):
        return False
    trial, scale = trials[answer.trial], SCALE[study.mode]
    return (
        type(trial.prompt) is int
        and 0 <= trial.prompt < len(study.prompts)
        and tuple(sorted(trial.shown)) in conditions(study.mode, len(study.variants))
        and all(getattr(answer, question) in scale for question in QUESTIONS)
        and isinstance(answer.seconds, float)
    )


def _passed(rater: Rater, answer: Answer) -> bool:
    asked = rater.trials[answer.trial].asked
    return asked is None or answer.quality == answer.alignment == asked


def _counts(collected: Collected, answer: Answer) -> bool:
    return answer.rater not in collected.excluded and collected.raters[answer.rater].trials[answer.trial].asked is None


def ratings(collected: Collected, question: str) -> Ratings:
    """Return the answers to a question that count; in pairs 1, 0 or -1 for how far the later variant is preferred."""
    kinds = conditions(collected.study.mode, len(collected.study.variants))
    rows = []
    for answer in collected.answers:
        if _counts(collected, answer):
            trial, value = collected.raters[answer.rater].trials[answer.trial], getattr(answer, question)
            ordered = tuple(sorted(trial.shown))
            rows.append((value if trial.shown == ordered else -value, answer.rater, trial.prompt, kinds.index(ordered)))
    value, rater, prompt, condition = np.asarray(rows, np.int64).T
    return Ratings(
        value=value.astype(np.float64), rater=rater, prompt=prompt, condition=condition, conditions=len(kinds)
    )


def summarise(collected: Collected) -> dict[str, Any]:
    """Return the content of table, plot and JSON. An interval is [value, low, high].

    None stands for an interval without answers; low and high are None for a single answer.
    """
    study, answering = collected.study, {a.rater for a in collected.answers}
    complete = [
        r.number for r in collected.raters if sum(a.rater == r.number for a in collected.answers) == len(r.trials)
    ]
    seconds = [a.seconds for a in collected.answers if _counts(collected, a)]
    rows, agreement = [], {}
    for question in QUESTIONS:
        answers = ratings(collected, question)
        agreement[question] = alpha(answers)
        rows += _mos_rows(study, question, answers) if study.mode == "mos" else _pair_rows(study, question, answers)
    return {
        "schema": 1,
        "title": study.title,
        "mode": study.mode,
        "original": study.variants[0],
        "raters": {
            "answered": len(answering),
            "finished": len(complete),
            "missed_a_check": len(collected.excluded),
            "counted": len(answering - collected.excluded),
        },
        "prompts": len(study.prompts),
        "median_answer_s": float(np.median(seconds)),
        "krippendorff_alpha": agreement,
        "rows": rows,
    }


def _mos_rows(study: Study, question: str, answers: Ratings) -> list[dict[str, Any]]:
    means, differences = answers.means(), [answers.of(unit) for unit in (answers.rater, answers.prompt)]
    draws = bootstrap(answers)
    first = draws[:, :1]
    known = sampled(answers)
    both = [k and known[0] for k in known]
    scores = _triples(means, interval(draws), known)
    drops = _triples(means[0] - means, interval(first - draws), both)
    shares = _triples((means[0] - means) / means[0], interval((first - draws) / first), both)
    tests = [holm([paired_test(d[:, 0] - d[:, v]) for v in range(1, len(means))]) for d in differences]
    counts = np.bincount(answers.condition, minlength=answers.conditions)
    return [
        {
            "variant": name,
            "question": question,
            "answers": int(counts[v]),
            "mos": scores[v],
            "drop": drops[v] if v else None,
            "relative_drop": shares[v] if v else None,
            "p_raters": tests[0][v - 1] if v else None,
            "p_prompts": tests[1][v - 1] if v else None,
        }
        for v, name in enumerate(study.variants)
    ]


def _pair_rows(study: Study, question: str, answers: Ratings) -> list[dict[str, Any]]:
    shares = _triples((answers.means() + 1) / 2, interval((bootstrap(answers) + 1) / 2), sampled(answers))
    sides = [answers.of(unit) for unit in (answers.rater, answers.prompt)]
    tests = [holm([paired_test(d[:, c]) for c in range(answers.conditions)]) for d in sides]
    counts = np.bincount(answers.condition, minlength=answers.conditions)
    return [
        {
            "variant": study.variants[later],
            "question": question,
            "answers": int(counts[c]),
            "preferred": shares[c],
            "over": study.variants[earlier],
            "p_raters": tests[0][c],
            "p_prompts": tests[1][c],
        }
        for c, (earlier, later) in enumerate(conditions(study.mode, len(study.variants)))
    ]


def _triples(values: Floats, bounds: tuple[Floats, Floats], known: Sequence[bool]) -> list[list[float | None] | None]:
    """Return [value, low, high] of each condition; None without answers, low and high None where not `known`."""
    rows = zip(values, *bounds, known, strict=True)
    return [
        None if np.isnan(value) else [float(value), *((float(low), float(high)) if k else (None, None))]
        for value, low, high, k in rows
    ]


# ------------------------------------------------------------------------------------------- table, files, plot


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return interval_text(value, ".1%" if name in ("relative_drop", "preferred") else ".2f")
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def tables(summary: dict[str, Any]) -> list[Table]:
    """Return one table per question, narrow enough for a terminal; the files have all columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = []
    for question in QUESTIONS:
        table = Table(
            title=Text(printable(f"{summary['title']}: {question}")), box=box.SIMPLE_HEAD, title_justify="left"
        )
        for name, title in _SHOWN[summary["mode"]].items():
            table.add_column(title, justify="left" if name in ("variant", "over") else "right")
        for row in summary["rows"]:
            if row["question"] == question:
                table.add_row(*(Text(printable(_text(name, row[name]))) for name in _SHOWN[summary["mode"]]))
        out.append(table)
    return out


def notes(summary: dict[str, Any]) -> list[str]:
    """Return what a reader of the tables needs to know: raters, method, agreement."""
    who, agreement = summary["raters"], summary["krippendorff_alpha"]
    over = [name for name, count in (("raters", who["counted"]), ("prompts", summary["prompts"])) if count > 1]
    agreements = ", ".join(f"{q} {'-' if a is None else f'{a:.2f}'}" for q, a in agreement.items())
    return [
        f"{who['counted']} raters counted ({who['finished']} of {who['answered']} finished, {who['missed_a_check']} "
        f"left out for a missed attention check), {summary['prompts']} prompts, "
        f"{summary['median_answer_s']:.0f} s per answer.",
        f"Intervals: 95 %, bootstrap over {' and '.join(over) or 'nothing: one answer has none'}. "
        "p: paired permutation tests, over raters and over prompts, Holm-corrected.",
        f"Agreement (Krippendorff's alpha, interval): {agreements}.",
    ]


def write(collected: Collected, summary: dict[str, Any], out: Path) -> list[Path]:
    """Write `results.json`, `results.csv`, `answers.csv` and the plot as SVG and PNG; return their paths.

    Raises:
        EdgepruneError: the folder cannot be written.
    """
    write_json(out / "results.json", summary)
    names = _COLUMNS[summary["mode"]]
    wide = [name for name in names if any(isinstance(row[name], list) for row in summary["rows"])]
    header = [
        column for name in names for column in ([name, f"{name}_low", f"{name}_high"] if name in wide else [name])
    ]
    rows = []
    for row in summary["rows"]:
        rows.append([v for n in names for v in ((row[n] or [None] * 3) if n in wide else [row[n]])])
    contents = {"results.csv": _csv([header, *rows]), "answers.csv": _csv(_answer_rows(collected))}
    figure = plot(summary)
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=kind, bbox_inches="tight", dpi=200, metadata={"Date": None} if kind == "svg" else {}
        )
        contents[f"results.{kind}"] = buffer.getvalue()
    for name, content in contents.items():
        try:
            (out / name).write_bytes(content)
        except OSError as error:
            raise cannot_write(out / name, error) from error
    return [out / name for name in ("results.json", *contents)]


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _answer_rows(collected: Collected) -> list[list[Any]]:
    """Return every answer, counted or not; in pairs 1 prefers the image on the right and -1 the one on the left."""
    study = collected.study
    shown = ["variant"] if study.mode == "mos" else ["left", "right"]
    header = ["rater", "trial", "file", "prompt", *shown, *QUESTIONS, "asked", "seconds", "at", "counted"]
    rows: list[list[Any]] = [header]
    for a in collected.answers:
        trial = collected.raters[a.rater].trials[a.trial]
        names = [study.variants[v] for v in trial.shown]
        rows.append(
            [a.rater, a.trial, study.files[trial.prompt], study.prompts[trial.prompt], *names, a.quality, a.alignment]
            + [trial.asked, round(a.seconds, 2), a.at, int(_counts(collected, a))]
        )
    return rows


def plot(summary: dict[str, Any]) -> Any:
    """Return a matplotlib figure: a point with its interval for each row, a colour for each question."""
    with needs("study"):
        from matplotlib.figure import Figure
    mos = summary["mode"] == "mos"
    rows = summary["rows"]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    figure = Figure(figsize=(7, 1.4 + 0.55 * len(labels)))
    axes = figure.subplots()
    for number, question in enumerate(QUESTIONS):
        for row in (r for r in rows if r["question"] == question):
            if value := row["mos" if mos else "preferred"]:
                y = labels.index(_label(row)) + (number - 0.5) * 0.28
                bars = None if value[1] is None else [[value[0] - value[1]], [value[2] - value[0]]]
                marker = "os"[number]
                axes.errorbar([value[0]], [y], xerr=bars, fmt=marker, ms=6, capsize=3, color=PALETTE[question])
    for number, question in enumerate(QUESTIONS):
        axes.plot([], [], "os"[number], color=PALETTE[question], label=question)
    low, *_, high = SCALE["mos"] if mos else (0, 1)
    axes.set(
        yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5), xlim=(low, high),
        xlabel="mean opinion score, 95 % interval" if mos else "share that prefers it, ties half, 95 % interval",
    )  # fmt: skip
    if not mos:
        axes.axvline(0.5, color="#888888", lw=1, zorder=0)
    axes.grid(axis="x", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _label(row: dict[str, Any]) -> str:
    return f"{row['variant']} over {row['over']}" if "over" in row else str(row["variant"])
