"""Bounds on the figures of a bench, as `edgeprune bench --assert` takes them."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

from edgeprune.bench.results import MEASURES, BenchResult
from edgeprune.common.errors import AssertionMissedError, InputError

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_EXPRESSION = re.compile(r"\s*([^\s<>=]+?)\s*(<=|>=|==|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


COMPARED = (*(f"{stem}_ratio" for _, stem in MEASURES.values()), "psnr_db", "score_drop")
"""What compares a variant with the first."""


def named_values(result: BenchResult) -> dict[str, float | None]:
    """Return the values that an assertion may name.

    `peak_ratio` compares the second variant with the first; `NAME.peak_ratio` and `NAME.load_s` name a variant.
    """
    out: dict[str, float | None] = {}
    for m in (*result.variants, *result.slower_originals):
        out |= {f"{m.name}.{key}": value for key, value in m.values.items()}
        if m.quality:
            out[f"{m.name}.score"] = m.quality.score
    for i, (name, c) in enumerate(result.comparisons.items()):
        compared: dict[str, float | None] = {**c.ratios, "psnr_db": c.psnr_db, "score_drop": c.score_drop}
        out |= {f"{name}.{key}": value for key, value in compared.items()}
        if i == 0:
            out |= compared
    return out


def parse_expression(text: str) -> tuple[str, str, float]:
    """Split an expression like `peak_ratio<=0.25` into name, operator and number.

    Raises:
        InputError: the text has another form, or no bench has such a measure.
    """
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise InputError(f"--assert: found {text!r}, expected NAME OP NUMBER, such as 'peak_ratio<=0.25'")
    variant, _, measure = match[1].rpartition(".")
    if measure not in (COMPARED if not variant else (*COMPARED, *MEASURES, "score")):
        expected = f"one of {', '.join(sorted(COMPARED))}, or VARIANT.MEASURE"
        if variant:
            expected = f"{variant}. and one of {', '.join(sorted((*COMPARED, *MEASURES, 'score')))}"
        raise InputError(f"--assert: {match[1]}: unknown, expected {expected}")
    return match[1], match[2], float(match[3])


def assert_expressions(result: BenchResult, expressions: Sequence[str]) -> None:
    """Check the result against bounds; one error reports all that are missed.

    Raises:
        InputError: an expression is malformed, or names a value that is unknown or was not measured here.
        AssertionMissedError: a bound does not hold.
    """
    values = named_values(result)
    missed = []
    for text in expressions:
        name, op, bound = parse_expression(text)
        if name not in values:
            short = sorted(k for k in values if "." not in k) or sorted(values)
            raise InputError(f"--assert: {name}: unknown, expected one of {', '.join(short)}, or VARIANT.MEASURE")
        value = values[name]
        if value is None:
            raise InputError(f"--assert: {name}: was not measured in this run")
        if not _OPERATORS[op](value, bound):
            missed.append(f"{name} is {value:.6g}, not {op} {bound:g}")
    if missed:
        raise AssertionMissedError("; ".join(missed))
