"""Four kills lose nothing: the short form of tests/hard/test_kills.py. A loss would be noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kills
import pytest


@pytest.mark.slow  # a process for each kill; quick tests interrupt every stage in this process
def test_four_kills_lose_nothing() -> None:
    tests = Path(__file__).parents[1]
    command = [
        sys.executable,
        tests / "kills.py",
        "--kills",
        "4",
        "--stages",
        "analyze",
        "distill",
        "tail",
        "quantize",
        "cache",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["losses"] == [] and outcome["kills"] >= 4 and outcome["files_read"]


def test_losses_are_seen(tmp_path: Path) -> None:
    for name, text in (("a.json", '{"a": 1'), ("w.safetensors", "x"), ("b.json", "{}"), ("c.json.tmp", "{")):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "e.json").write_text("{")
    count, bad = kills.unreadable(tmp_path)
    assert count == 3 and [line.split(":")[0] for line in bad] == ["a.json", "w.safetensors"]
    log = tmp_path / "log"
    log.write_text("analyze 1\nanalyze 2\ndistill 2\ndistill 3\ndistill 2\nshard x 0\n")
    assert kills.done_twice(log) == []
    log.write_text("distill 3\nshard x 0\ndistill 3\nshard x 0\n")
    assert kills.done_twice(log) == ["distill 3", "shard x 0"]
    (tmp_path / "edgeprune.json").write_text('{"stages": {"plan": {"seconds": 1.0, "inputs": "a"}}}')
    before = kills.contents(tmp_path)
    (tmp_path / "edgeprune.json").write_text('{"stages": {"plan": {"seconds": 2.0, "inputs": "a"}}}')
    assert kills.contents(tmp_path) == before and "log" not in before
    (tmp_path / "edgeprune.json").write_text('{"stages": {"plan": {"seconds": 1.0, "inputs": "b"}}}')
    assert kills.contents(tmp_path) != before
