"""Count what the fuzzer and the properties tried, and print the counts at the end of the run."""

from __future__ import annotations

import collections

import properties
import pytest

TRIED: collections.Counter[str] = collections.Counter()
REFUSED: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="session")
def tried() -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Counters by target: inputs tried, and inputs refused with an EdgepruneError."""
    return TRIED, REFUSED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in TRIED.items():
        terminalreporter.write_line(f"fuzz: {name}: {count} inputs, {REFUSED[name]} refused")
    if TRIED:
        terminalreporter.write_line(f"fuzz: {sum(TRIED.values())} inputs in all")
    for name, count in properties.TRIED.items():
        terminalreporter.write_line(f"property: {name}: {count} inputs")
