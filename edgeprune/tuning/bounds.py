"""How much worse a choice may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """How much worse than the folder's own settings a choice may be: the upper ends of 95 % intervals over prompts."""

    psnr_db: float
    """Drop of the PSNR to the exact solution, in dB."""
    score: float
    """Drop of the reference-free score, as a share of it."""
