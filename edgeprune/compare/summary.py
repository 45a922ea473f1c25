"""Sums up the runs of a grid row by row; intervals are bootstraps over prompts and, where there are several, seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.intervals import Interval, excludes_zero, mean_interval, paired_drop
from edgeprune.compare.grid import Grid, Row

WINS, LOSES, UNDECIDED, ONE_SEED = "wins", "loses", "undecided", "one seed"
"""Verdicts on the reference against a row. `one seed`: the interval excludes 0, but a training seed is not sampled."""


def summarise(results: Mapping[str, Any], grid: Grid, tasks: list[str] | None) -> dict[str, Any]:
    """Return for each row its bytes, score, relative drop and the reference's lead, sampled figures with an interval.

    Args:
        results: the content of results.json: `original` and `<row>/seed-<n>`.
        tasks: the task of each prompt, where the metric has tasks.
    """
    original = np.asarray(results["original"]["scores"])
    runs = {row.name: [results[f"{row.name}/seed-{seed}"] for seed in range(row.seeds)] for row in grid.rows}
    scores = {name: np.asarray([run["scores"] for run in row_runs]) for name, row_runs in runs.items()}
    reference = next(row for row in grid.rows if row.name == grid.reference)
    rows = []
    for row in grid.rows:
        row_runs = runs[row.name]
        same_plan = all(run["blocks"] == row_runs[0]["blocks"] for run in row_runs)  # random plans differ by seed
        seed_leads = _seed_leads(scores[reference.name], scores[row.name], tasks)
        lead = paired_drop(scores[reference.name], scores[row.name], tasks).difference
        rows.append(
            {
                "name": row.name,
                "group": row.group,
                "seeds": row.seeds,
                "blocks": row_runs[0]["blocks"] if same_plan else None,
                "components": len(row_runs[0]["components"]),
                "modulation_rank": row_runs[0]["modulation_rank"],
                "bytes": max(run["bytes"] for run in row_runs),
                "bytes_ratio": max(run["bytes"] for run in row_runs) / results["original"]["bytes"],
                "step_ratio": float(np.median([run["step_ratio"] for run in row_runs])),
                "step_ratio_quartiles": _step_quartiles(row_runs),
                "train_s": sum(run["train_s"] for run in row_runs),
                "steps": sorted({run["steps"] for run in row_runs}) if row.work is not None else None,
                "score": mean_interval(scores[row.name], tasks),
                "relative_drop": paired_drop(original, scores[row.name], tasks).relative,
                "lead": None if row is reference else lead,
                "verdict": None if row is reference else verdict(lead, seed_leads, reference, row),
                "one_seed": row.varies and row.seeds == 1,
            }
        )
    return {
        "budget": grid.budget,
        "reference": grid.reference,
        "prompts": len(original),
        "seconds": sum(run.get("seconds", 0.0) for run in results.values()),
        "original": {"score": mean_interval(original, tasks), "bytes": results["original"]["bytes"]},
        "rows": rows,
    }


def verdict(lead: Interval, seed_leads: Sequence[float], reference: Row, rival: Row) -> str:
    """Return whether the reference wins against a rival, by the interval of its lead over prompts and seeds.

    It wins or loses only if the interval excludes 0, if both were run with several seeds or depend on none, and if the
    lead over every seed of the rival, and that of every seed of the reference, has the same sign: few seeds say little
    about their spread.
    """
    if not excludes_zero(lead):
        return UNDECIDED
    if any(row.varies and row.seeds == 1 for row in (reference, rival)):
        return ONE_SEED
    if min(seed_leads) * max(seed_leads) <= 0:
        return UNDECIDED
    return WINS if lead.mean > 0 else LOSES


def _seed_leads(reference: NDArray[np.float64], rival: NDArray[np.float64], tasks: list[str] | None) -> list[float]:
    """Return the leads of all seeds of the reference over each seed of the rival, and of each over all of the rival.

    Args:
        reference, rival: scores by seed and prompt, (S, P).
        tasks: the task of each prompt.
    """
    pairs = [(reference, seed) for seed in rival] + [(seed, rival) for seed in reference]
    return [mean_interval(a, tasks, draws=1).mean - mean_interval(b, tasks, draws=1).mean for a, b in pairs]


def _step_quartiles(runs: list[dict[str, Any]]) -> list[float] | None:
    """Return the quartiles of the step's ratio, medians over runs; None where no run timed several steps."""
    known = [quartiles for run in runs if (quartiles := run.get("step_ratio_quartiles"))]
    return np.median(known, axis=0).tolist() if known else None
