"""One step of sampling here against one step of diffusers' own pipeline in float32."""

from __future__ import annotations

from edgeprune.verify.finding import Finding, error_finding
from edgeprune.verify.subject import Subject

NAME = "step"
_ADVICE = (
    "this transformer does not compute here what its files say: --dtype fp32 shows whether the dtype is the cause, "
    "--device cpu whether the device is"
)


def check(subject: Subject) -> list[Finding]:
    """Compare the change of the latents, for each transformer of the folder."""
    return [
        error_finding(NAME, subfolder, step.dtype, step.found, step.expected, _ADVICE)
        for subfolder, step in subject.steps.items()
    ]
