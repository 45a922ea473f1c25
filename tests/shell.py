"""Run the command line as a user does: in a process of its own, or in this one, which has imported everything."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from edgeprune.cli import main


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `edgeprune` with these arguments and capture what it prints."""
    command = [sys.executable, "-m", "edgeprune.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def run_here(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Do the same in this process, which takes no seconds to start."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():  # `main` shows them in its own way
        warnings.simplefilter("default")
        patch.setattr(sys, "argv", ["edgeprune", *args])
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            patch.setenv(name, "error")
        if cwd is not None:
            patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(args, int(end.value.code or 0), out.getvalue(), err.getvalue())
