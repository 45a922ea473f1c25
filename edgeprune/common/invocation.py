"""The command that the user typed. A folder's manifest keeps it for each stage; from Python there is none."""

from __future__ import annotations

from contextvars import ContextVar

command: ContextVar[str] = ContextVar("command", default="")
"""Set by the command line, such as `edgeprune prune -o small`; empty in other programs."""
