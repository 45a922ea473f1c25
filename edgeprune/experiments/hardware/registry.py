"""What a check is, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.experiments.hardware.place import Place

MODULES = {
    "gpu": ("memory", "stages", "blocks", "networks", "nvidia"),
    "mac": ("memory", "stages", "blocks", "networks", "apple"),
}
"""The files of checks/ by the kind of machine."""


class LeftOut(Exception):
    """A check cannot be made on this machine; says why."""


class Failed(Exception):
    """What a check found is wrong; says how."""


@dataclass(frozen=True)
class Check:
    """One thing that is tried."""

    name: str
    what: str
    """What is tried, for the table."""
    run: Callable[[Place], str]
    """Tries it and returns figures.

    Raises:
        Failed: the result is wrong.
        LeftOut: it cannot be tried here.
    """
    seconds: int
    """After which it is stopped."""
    needs: tuple[str, ...] = ()
    """Modules without which it is left out."""


def check(
    what: str, *, seconds: int, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
    """Make a check of a function; its name is that of the check."""

    def add(run: Callable[[Place], str]) -> Callable[[Place], str]:
        name = run.__name__.replace("_", "-")
        run.check = Check(name, what, run, seconds, needs)  # type: ignore[attr-defined]
        return run

    return add


def checks(kind: str) -> dict[str, Check]:
    """Return the checks of a kind of machine by name, in the order in which they run. Imports no vendor."""
    found: dict[str, Check] = {}
    for name in MODULES[kind]:
        module = importlib.import_module(f"edgeprune.experiments.hardware.checks.{name}")
        made = [value.check for value in vars(module).values() if hasattr(value, "check")]
        found |= {one.name: one for one in made}
    return found
