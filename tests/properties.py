"""Properties: what must hold for every input of a kind, tried with inputs that hypothesis draws.

An input is a JSON value, from which a test makes files. CI tries a few inputs, always the same; with MINUTES in the
environment, `make test-hard` tries new ones for that time, divided among the properties. An input that fails is
shrunk and written to tests/hard/regressions/: commit the file, and every later run begins with it.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import inspect
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

REGRESSIONS = Path(__file__).parent / "hard" / "regressions"
TRIED: collections.Counter[str] = collections.Counter()
"""Inputs tried, by property."""
PROPERTIES: list[str] = []
"""Those of the test files that were collected."""


def holds(cases: st.SearchStrategy[Any], *, few: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a function that takes an input as `case`, a new folder as `place`, and fixtures.

    Args:
        cases: draws inputs, which are JSON values.
        few: how many inputs CI tries.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        name = check.__name__.removeprefix("test_")
        PROPERTIES.append(name)
        signature = inspect.signature(check)
        asked = [p for p in signature.parameters.values() if p.name not in ("case", "place")]

        @functools.wraps(check)
        def test(**fixtures: Any) -> None:
            def attempt(case: Any) -> None:
                TRIED[name] += 1
                with tempfile.TemporaryDirectory() as place:
                    check(case=case, place=Path(place), **fixtures)

            _replay(name, attempt)
            _draw(name, cases, few, attempt)

        test.__signature__ = signature.replace(parameters=asked)  # type: ignore[attr-defined]
        return test

    return decorate


def _replay(name: str, attempt: Callable[[Any], None]) -> None:
    """Try the inputs that failed once."""
    for path in sorted(REGRESSIONS.glob(f"{name}.*.json")):
        attempt(json.loads(path.read_text()))


def _draw(name: str, cases: st.SearchStrategy[Any], few: int, attempt: Callable[[Any], None]) -> None:
    """Try a few inputs, or round after round of new ones until the time is over."""
    minutes = float(os.environ.get("MINUTES") or 0)
    end = time.monotonic() + 60 * minutes / len(PROPERTIES)
    failed: Any = None

    def kept(case: Any) -> None:
        nonlocal failed
        try:
            attempt(case)
        except BaseException:
            failed = case
            raise

    quiet = settings(
        max_examples=few, deadline=None, database=None, derandomize=not minutes,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    try:
        while True:
            # Of a function of its own in each round: hypothesis would remember the seed of the last one.
            trial = given(cases)(lambda case: kept(case))
            quiet(seed(random.getrandbits(32))(trial) if minutes else trial)()
            if time.monotonic() >= end:
                return
    except (Exception, pytest.fail.Exception):
        _keep(name, failed)  # the last one that hypothesis tried, which is the smallest
        raise


def _keep(name: str, case: Any) -> None:
    content = json.dumps(case, indent=1, sort_keys=True) + "\n"
    REGRESSIONS.mkdir(exist_ok=True)
    path = REGRESSIONS / f"{name}.{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    path.write_text(content)
    print(f"kept as {path.relative_to(REGRESSIONS.parents[2])}: commit it with the mend")
