"""Chooses what the activations of an export's transformer are computed in.

How far a precision is from float32 is a property of the numbers: an export measures it on the model's own prompts
(export/precisions.py) and keeps it in edgeprune_export.json. How fast a precision is depends on the processor: without
the instructions for it, it is no faster than float32 or much slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.processor import INT8_DOT_PRODUCTS, MULTIPLY_BF16, instructions

AUTO, EXACT = "auto", "exact"
FIELD = "precisions"
"""What edgeprune_export.json calls the measured errors."""
BOUND = 2e-2
"""Largest error of the velocity, as a share of its norm, of a precision that is chosen unasked."""
_NEEDS = {"int8": ("int8 dot products", INT8_DOT_PRODUCTS), "bf16": ("bf16 products", MULTIPLY_BF16)}
"""The instructions that make a precision faster than float32: what they do, and any of these names."""


@dataclass(frozen=True)
class Chosen:
    """A precision, and why it is used."""

    name: str
    why: str


def fast_here(precision: str) -> bool:
    """Return whether this processor has the instructions that make a precision faster than float32."""
    return bool(_NEEDS[precision][1] & instructions())


def choose(asked: str, offered: Sequence[str], exported: Mapping[str, Any], runtime: str) -> Chosen:
    """Choose the precision in which a runtime computes an export's transformer.

    Args:
        asked: one of `offered`, EXACT, or AUTO for the fastest that this processor has instructions for, if the export
            measured it to be within BOUND.
        offered: the precisions that the runtime has here besides its most exact one, the fastest first.
        exported: the content of edgeprune_export.json.
        runtime: the runtime's name.

    Raises:
        InputError: `asked` is none of these.
    """
    known = (AUTO, EXACT, *offered)
    if asked not in known:
        raise InputError(f"precision: found {asked!r}, expected one of {', '.join(known)}")
    if asked != AUTO:
        return Chosen(asked, f"precision={asked}")
    if not offered:
        return Chosen(EXACT, "")
    field = exported.get(FIELD)
    errors = field.get(runtime) if isinstance(field, Mapping) else None
    if not isinstance(errors, Mapping):
        return Chosen(EXACT, "exact, the export measured no other precision")
    reasons = []
    for name in offered:
        error = errors.get(name)
        if not isinstance(error, int | float):
            reasons.append(f"{name} was not measured")
        elif not error <= BOUND:
            reasons.append(f"{name} is off by {error:.2g}")
        elif not fast_here(name):
            reasons.append(f"no {_NEEDS[name][0]} here")
        else:
            return Chosen(name, f"{name}, off by {error:.2g}")
    return Chosen(EXACT, f"exact, {', '.join(reasons)}")
