"""Run the command line as a user does, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `edgeprune` with these arguments and capture what it prints."""
    command = [sys.executable, "-m", "edgeprune.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
