"""Overflow in half precision: the largest activation of each network against float16's largest number.

Activations are those of the reference, which computes in float32. One beyond the bound becomes infinity in float16. It
fails the run where the network computes in float16 here; elsewhere it is a warning, since T5-XXL has such activations
as it was published, and runs well in bf16.
"""

from __future__ import annotations

import math

import torch

from edgeprune.residency.compute import name_of
from edgeprune.verify.finding import FAIL, PASS, WARNING, Finding, finite
from edgeprune.verify.peaks import Peak
from edgeprune.verify.subject import Subject

NAME = "overflow"
BOUND = torch.finfo(torch.float16).max


def check(subject: Subject) -> list[Finding]:
    """Judge the largest activation of each network."""
    text, trip = subject.text, subject.round_trip
    parts = {name: (text.dtypes[name], peak) for name, peak in text.peaks.items()}
    parts |= {name: (step.dtype, step.peak) for name, step in subject.steps.items()}
    parts["vae"] = (trip.dtype, trip.peak)
    return [_judged(name, dtype, peak) for name, (dtype, peak) in parts.items()]


def _judged(part: str, dtype: torch.dtype, peak: Peak) -> Finding:
    verdict, advice = PASS, f"at {peak.module}"
    if not math.isfinite(peak.value):
        verdict, advice = FAIL, f"NaN or infinity in float32, first at {peak.module}: the weights are damaged"
    elif peak.value > BOUND:
        verdict = FAIL if dtype == torch.float16 else WARNING
        advice = f"at {peak.module}: float16 overflows; on devices run and export this part in bf16 or float32"
    return Finding(NAME, part, verdict, "max activation", finite(peak.value), BOUND, name_of(dtype), advice)
