# TEMP facade
"""Moved to methods/."""

from __future__ import annotations

from collections.abc import Callable

from edgeprune.analysis.contribution import Key
from edgeprune.planning.methods import Measured as Measured
from edgeprune.planning.methods import Problem as Problem
from edgeprune.planning.methods import Scored, methods

PLANNERS = tuple(name for name, method in methods().items() if isinstance(method, Scored) and method.joint)


def planner_named(name: str) -> Callable[[Problem], list[Key]]:
    """Return the function of a scored method."""
    method = methods()[name]
    assert isinstance(method, Scored)
    return method.choose
