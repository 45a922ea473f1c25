"""At least 50 kills of analyze, distill, quantize, export and cache lose nothing, see tests/kills.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 50


@pytest.mark.hard
def test_kills_at_any_moment_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, Path(__file__).parents[1] / "kills.py", "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{outcome}")
    assert outcome["losses"] == []
    assert outcome["kills"] >= KILLS and set(outcome["by_stage"]) == {
        "analyze",
        "distill",
        "quantize",
        "export",
        "cache",
    }
    assert outcome["files_read"] > 10 * KILLS
