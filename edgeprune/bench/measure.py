# TEMP facade
"""Names that moved to run.py, results.py, tables.py, assertions.py, disk.py, machine.py and common/tables.py."""

from edgeprune.bench.assertions import assert_expressions, named_values, parse_expression
from edgeprune.bench.disk import disk_bytes, weights_bytes
from edgeprune.bench.machine import machine, memory_bandwidth
from edgeprune.bench.results import (
    MEASURES,
    SCHEMA_VERSION,
    BenchResult,
    Comparison,
    Measured,
    Quality,
    compare,
    load,
    to_json,
)
from edgeprune.bench.run import PROMPT, Variant, psnr_db, run
from edgeprune.bench.tables import table
from edgeprune.common.tables import with_unit as show

figures = named_values
__all__ = [
    "MEASURES",
    "PROMPT",
    "SCHEMA_VERSION",
    "BenchResult",
    "Comparison",
    "Measured",
    "Quality",
    "Variant",
    "assert_expressions",
    "compare",
    "disk_bytes",
    "figures",
    "load",
    "machine",
    "memory_bandwidth",
    "parse_expression",
    "psnr_db",
    "run",
    "show",
    "table",
    "to_json",
    "weights_bytes",
]
