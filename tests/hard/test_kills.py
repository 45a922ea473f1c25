"""At least 50 kills over analyze, distill, quantize, export and cache, and nothing lost: see tests/kills.py."""

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
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{found}")
    assert found["losses"] == []
    assert found["kills"] >= KILLS and set(found["by_stage"]) == {"analyze", "distill", "quantize", "export", "cache"}
    assert found["files_read"] > 10 * KILLS
