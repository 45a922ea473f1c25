# TEMP facade
"""Names that moved to make.py and measure.py."""

from edgeprune.report.make import lacking_memory as memory_short
from edgeprune.report.make import make_report as make
from edgeprune.report.make import summary_rows as rows
from edgeprune.report.measure import step_times

__all__ = ["make", "memory_short", "rows", "step_times"]
