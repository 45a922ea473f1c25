"""The checks of `verify`, one file each: `check` takes a `Subject` and returns its findings.

A new check is one new file here, and its name in `CHECKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from edgeprune.verify.finding import Finding
from edgeprune.verify.subject import Subject

CHECKS = ("files", "text", "encoders", "step", "vae", "overflow")
"""In the order of the table. Nothing else is checked if `files` fails."""

Check = Callable[[Subject], list[Finding]]


def load(name: str) -> Check:
    """Return the check of a name of `CHECKS`."""
    return cast("Check", importlib.import_module(f"{__name__}.{name}").check)
