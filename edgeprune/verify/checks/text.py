"""The condition: the text that the transformer gets here against that of diffusers' `encode_prompt` in float32."""

from __future__ import annotations

from edgeprune.families.encoders import LONG, text_encoders
from edgeprune.verify.finding import BOUNDS, Finding, error_finding
from edgeprune.verify.subject import Subject

NAME = "text"
_ADVICE = "the prompt is not encoded as diffusers does it; see which encoder differs below"


def check(subject: Subject) -> list[Finding]:
    """Compare hidden and pooled text; T5 and Qwen3 have no pooled text, and FLUX.2 has none at all."""
    text, kinds = subject.text, text_encoders(subject.folder)
    pooled = [dtype for name, dtype in text.dtypes.items() if kinds[name] not in LONG]
    rows = (
        ("hidden", [*text.dtypes.values()], text.found.hidden, text.expected.hidden),
        ("pooled", pooled, text.found.pooled, text.expected.pooled),
    )
    return [
        error_finding(NAME, part, max(dtypes, key=BOUNDS.__getitem__), found, expected, _ADVICE)
        for part, dtypes, found, expected in rows
        if dtypes
    ]
