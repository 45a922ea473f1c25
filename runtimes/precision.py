"""Chooses what OpenVINO computes the activations of an export's transformer in.

How far a precision is from float32 is a property of the numbers: an export measures it on the model's own prompts
(export/precisions.py) and keeps it in edgeprune_export.json. How fast a precision is depends on the processor: without
the instructions for it, it is no faster than float32 or much slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.processor import INT8_DOT_PRODUCTS, MULTIPLY_BF16, instructions, lists_x86

AUTO, EXACT = "auto", "exact"
FIELD = "precisions"
"""What edgeprune_export.json calls the measured errors."""
BOUND = 2e-2
"""Largest error of the velocity, as a share of its norm, of a precision that is chosen unasked."""
_INT8, _BF16 = ("int8 dot products", INT8_DOT_PRODUCTS), ("bf16 products", MULTIPLY_BF16)
_NEEDS = {"int8-bf16": (_INT8, _BF16), "int8": (_INT8,), "bf16": (_BF16,)}
"""The instructions without which a precision is no faster than float32: what they do, and any of these names."""


@dataclass(frozen=True)
class Chosen:
    """A precision, and why it is used."""

    name: str
    why: str


def lacking(precision: str) -> list[str]:
    """Return the instructions that this processor lacks, without which a precision is no faster than float32."""
    return [what for what, names in _NEEDS[precision] if not names & instructions()]


def choose(asked: str, offered: Sequence[str], exported: Mapping[str, Any] | None) -> Chosen:
    """Choose the precision in which OpenVINO computes an export's transformer.

    On the CPU, a precision that is asked for by name needs its instructions, too: without them OpenVINO computes in
    float32, or emulates it and is slower. Where the instructions are unknown, the request is accepted.

    Args:
        asked: one of `offered`, EXACT, or AUTO for the fastest that this processor has instructions for, if the export
            measured it to be within BOUND.
        offered: the precisions of the device besides its most exact one, the fastest first.
        exported: the content of edgeprune_export.json, which measured the CPU; None for another device.

    Raises:
        InputError: `asked` is none of these, or this processor has no instructions for it.
    """
    known = (AUTO, EXACT, *offered)
    if asked not in known:
        raise InputError(f"precision: found {asked!r}, expected one of {', '.join(known)}")
    instructions_known = lists_x86(instructions())
    if asked != AUTO:
        missing = [] if asked == EXACT or exported is None or not instructions_known else lacking(asked)
        if missing:
            able = (AUTO, EXACT, *(name for name in offered if not lacking(name)))
            needed = " and ".join(missing)
            raise InputError(
                f"precision: found {asked!r}, which needs {needed}; this processor has none: expected one of "
                f"{', '.join(able)}"
            )
        return Chosen(asked, f"precision={asked}")
    if not offered or exported is None:
        return Chosen(EXACT, "")
    field = exported.get(FIELD)
    errors = field.get("openvino") if isinstance(field, Mapping) else None
    if not isinstance(errors, Mapping):
        return Chosen(EXACT, "exact, the export measured no other precision")
    reasons = []
    for name in offered:
        error = errors.get(name)
        if not isinstance(error, int | float):
            reasons.append(f"{name} was not measured")
        elif not error <= BOUND:
            reasons.append(f"{name} is off by {error:.2g}")
        elif missing := lacking(name):
            needed = " and ".join(missing) if instructions_known else "instructions that this system does not list"
            reasons.append(f"{name} needs {needed}")
        else:
            return Chosen(name, f"{name}, off by {error:.2g}")
    return Chosen(EXACT, f"exact, {', '.join(reasons)}")
