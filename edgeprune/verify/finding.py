"""What a check has found: a figure, its bound, a verdict, and what to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from edgeprune.residency.compute import name_of

PASS, WARNING, FAIL, NOT_JUDGED = "pass", "warning", "fail", "not judged"
"""Verdicts. Only `fail` fails the run."""
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Largest relative error of a network in a dtype against float32. That of float16 is the one of exports
(export/parity.py): rounding costs up to 3e-3 on random models; bf16 has three bits less, hence eight times as much."""
RELATIVE_ERROR = "relative error"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    """The name of the check."""
    part: str
    """What was checked: a subfolder of the model."""
    verdict: str
    """`pass`, `warning`, `fail` or `not judged`."""
    measure: str = ""
    """What the figure is, with its unit."""
    figure: float | None = None
    """None if it is not finite, or if nothing was measured."""
    bound: float | None = None
    dtype: str | None = None
    """What the part computes in; None if nothing was computed."""
    advice: str = ""
    """Where it was found, what it means and what to do; empty if there is nothing to say."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def error_finding(
    check: str, part: str, dtype: torch.dtype, found: torch.Tensor, expected: torch.Tensor, advice: str
) -> Finding:
    """Judge what a network computed by its relative error against float32.

    Args:
        check: the name of the check.
        part: what computed.
        dtype: what it computed in.
        found: what it computed.
        expected: the same from the reference.
        advice: what to do if the error is too large.
    """
    error, bound = relative_error(found, expected), BOUNDS[dtype]
    verdict, advice = (PASS, "") if error <= bound else (FAIL, advice)
    if not found.isfinite().all():
        advice = f"found NaN or infinity: {advice}"
    return Finding(check, part, verdict, RELATIVE_ERROR, finite(error), bound, name_of(dtype), advice)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return rms(found - expected) / rms(expected); infinite if that is no number."""
    a, b = found.cpu().double(), expected.cpu().double()
    error = float((a - b).norm() / b.norm()) if b.norm() > 0 else 0.0 if a.norm() == 0 else math.inf
    return error if math.isfinite(error) else math.inf


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return value if math.isfinite(value) else None
