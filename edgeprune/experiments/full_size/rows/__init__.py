"""The rows by name, in the order of the page. To add one, add it to the file of its kind."""

from __future__ import annotations

from edgeprune.experiments.full_size.rows import images, timed, tiny, whole
from edgeprune.experiments.full_size.rows.row import Row


def rows() -> dict[str, Row]:
    """Return all rows."""
    return {row.name: row for row in (*tiny.rows(), *whole.rows(), *timed.rows(), *images.rows())}
