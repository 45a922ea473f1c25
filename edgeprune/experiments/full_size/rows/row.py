"""What a row is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgeprune.experiments.full_size.forecast import Work
from edgeprune.experiments.full_size.recording import Recorder


@dataclass(frozen=True)
class Row:
    """A few commands that are measured together."""

    name: str
    what: str
    """One line for the list of rows."""
    work: Work
    disk_bytes: int
    """What it writes at most at a time, without the models that other rows make."""
    measure: Callable[[Recorder], None]
    needs: tuple[str, ...] = field(default=())
    """Rows that make the models it reads; each leaves a folder of its own `model`."""
    model: str | None = None
    """The folder of the pipeline that this row makes and leaves for others; None if it makes none."""
