"""Each text encoder: its outputs in the dtype that it computes in here against transformers' own in float32."""

from __future__ import annotations

from edgeprune.verify.finding import Finding, error_finding
from edgeprune.verify.subject import Subject

NAME = "encoders"
_ADVICE = "this encoder does not compute here what its files say: --dtype fp32 shows whether the dtype is the cause"


def check(subject: Subject) -> list[Finding]:
    """Compare all outputs of each encoder that are read."""
    text = subject.text
    return [error_finding(NAME, name, text.dtypes[name], *outputs, _ADVICE) for name, outputs in text.encoders.items()]
