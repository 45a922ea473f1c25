"""The precision of an export's transformer: chosen by errors that were measured and by the processor's instructions."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.common.errors import InputError
from edgeprune.runtimes import precision
from edgeprune.runtimes.precision import AUTO, BOUND, EXACT, choose

OFFERED = ("int8-bf16", "int8", "bf16")
ZEN5, ALDER_LAKE, SAPPHIRE = {"avx512_vnni", "avx512_bf16"}, {"avx_vnni"}, {"avx512_vnni", "amx_bf16"}
SKYLAKE, APPLE, HASWELL = {"avx512f", "avx512bw"}, set[str](), {"avx2", "fma"}


def measured(**errors: Any) -> dict[str, Any]:
    """What an export writes."""
    return {"precisions": {"openvino": errors, "prompts": 10, "height": 64, "width": 64}}


@pytest.mark.parametrize(
    ("here", "errors", "expected"),
    [
        (ZEN5, {"int8-bf16": 0.011, "int8": 0.01, "bf16": 0.005}, "int8-bf16"),
        (ALDER_LAKE, {"int8-bf16": 0.011, "int8": 0.01, "bf16": 0.005}, "int8"),
        (ZEN5, {"int8-bf16": 0.021, "int8": 0.01, "bf16": 0.005}, "int8"),
        (ALDER_LAKE, {"int8": 0.01, "bf16": 0.005}, "int8"),
        (ZEN5, {"int8": BOUND, "bf16": 0.005}, "int8"),
        (ZEN5, {"int8": 0.021, "bf16": 0.005}, "bf16"),
        (SAPPHIRE, {"bf16": 0.005}, "bf16"),
        (ALDER_LAKE, {"int8": 0.021, "bf16": 0.005}, EXACT),
        (SKYLAKE, {"int8": 0.01, "bf16": 0.005}, EXACT),
        (HASWELL, {"int8": 0.01, "bf16": 0.005}, EXACT),
        (APPLE, {"int8": 0.01, "bf16": 0.005}, EXACT),
        (ZEN5, {"int8": float("nan"), "bf16": float("inf")}, EXACT),
        (ZEN5, {"int8": "small", "bf16": None}, EXACT),
    ],
)
def test_the_fastest_that_is_exact_enough_and_has_its_instructions(
    here: set[str], errors: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(here))
    assert choose(AUTO, OFFERED, measured(**errors)).name == expected


def test_why_it_was_chosen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(ALDER_LAKE))
    assert choose(AUTO, OFFERED, measured(int8=0.0091)).why == "int8, off by 0.0091"
    found = choose(AUTO, ("int8-bf16",), measured(**{"int8-bf16": 0.01})).why
    assert found == "exact, int8-bf16 needs bf16 products"
    found = choose(AUTO, OFFERED, measured(int8=0.031, bf16=0.005)).why
    assert found == "exact, int8-bf16 was not measured, int8 is off by 0.031, bf16 needs bf16 products"
    assert choose(AUTO, ("int8",), measured()).why == "exact, int8 was not measured"


@pytest.mark.parametrize(
    "old", [{}, {"precisions": None}, measured(int8=0.01) | {"precisions": {"other": {"int8": 0}}}]
)
def test_an_export_that_measured_nothing_runs_as_before(old: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(ZEN5))
    found = choose(AUTO, OFFERED, old)
    assert (found.name, found.why) == (EXACT, "exact, the export measured no other precision")


def test_what_is_asked_for_is_used_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(ZEN5))
    for name in (EXACT, *OFFERED):
        found = choose(name, OFFERED, measured(int8=0.5))
        assert (found.name, found.why) == (name, f"precision={name}")
    with pytest.raises(InputError, match="precision: found 'bf16', expected one of auto, exact, int8$"):
        choose("bf16", ("int8",), {})
    assert choose(AUTO, (), measured(int8=0.01)).why == ""  # a GPU that chooses by itself


def test_what_the_processor_has_no_instructions_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO would compute float32 in its place, and say nothing."""
    both = "int8 dot products and bf16 products"
    for here, name, needed in (
        (HASWELL, "int8", "int8 dot products"),
        (HASWELL, "int8-bf16", both),
        (ALDER_LAKE, "bf16", "bf16 products"),
    ):
        monkeypatch.setattr(precision, "instructions", lambda here=here: frozenset(here))
        says = f"^precision: found '{name}', which needs {needed}; this processor has none: expected one of auto, exact"
        with pytest.raises(InputError, match=says):
            choose(name, OFFERED, measured(int8=0.01))
        assert choose(EXACT, OFFERED, {}).name == EXACT
        assert choose(name, OFFERED, None).name == name  # a GPU has its own
    for here in (APPLE, {"asimd", "asimddp"}):
        monkeypatch.setattr(precision, "instructions", lambda here=here: frozenset(here))
        assert choose("int8", OFFERED, {}).name == "int8"  # it may have them


def test_instructions_that_cannot_be_told_are_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(APPLE))
    found = choose(AUTO, ("int8",), measured(int8=0.01))
    assert found.why == "exact, int8 needs instructions that this system does not list"


def test_what_was_measured_on_the_cpu_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(ZEN5))
    found = choose(AUTO, ("int8",), None)
    assert (found.name, found.why) == (EXACT, "")
