"""The table of docs/memory.md: made from committed results, and measured in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.common.files import read_json
from edgeprune.common.memory import parse_bytes
from edgeprune.experiments import stage_peaks

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


def test_the_page_has_the_committed_results() -> None:
    entries = read_json(DOCS / "memory.json")["entries"]
    page = (DOCS / "memory.md").read_text(encoding="utf-8")
    assert f"<!-- measured -->\n{stage_peaks.table(entries)}\n<!-- end -->" in page
    for entry in entries:
        assert max(entry["peaks"].values()) <= parse_bytes(entry["memory"], "--memory")
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if "| 1024x1024 | " in line]
    named = [tuple(line.split(" | ")[-2:]) for line in rows[:2]]
    peaks = {entry["memory"]: max(entry["peaks"].values()) for entry in entries if entry["size"] == 1024}
    assert named == [(memory, f"**{peaks[memory] / 1e9:.2f} GB** |") for memory in ("2GB", "1.2GB")]


def test_smaller_limits_come_first_and_a_refusal_is_shown() -> None:
    entry: dict[str, Any] = {"model": "m", "size": 64, "steps": 2}
    measured = {"peaks": {"load": 10**9, "transformer": 2 * 10**9}, "seconds": {"load": 1.0, "transformer": 8.0}}
    lines = stage_peaks.table(
        [entry | {"memory": "all"} | measured, entry | {"memory": "10GB"} | measured,
         entry | {"memory": "2GB", "refused": "too little"}]
    ).splitlines()[2:]  # fmt: skip
    assert [line.split(" | ")[2] for line in lines] == ["2GB", "10GB", "all"]
    assert "too little" in lines[0] and "| 1.00 GB | 2.00 GB | **2.00 GB** | 4 s |" in lines[1]


@pytest.mark.skipif(sys.platform != "linux", reason="resets the kernel's peak")
def test_stages_are_measured(tiny_folders: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino")
    found = stage_peaks._tried(tiny_folders[1], "all", 32, 1)
    assert list(found["peaks"]) == ["load", "text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
    assert found["seconds"].keys() == found["peaks"].keys()
    assert found["peaks"]["load"] < found["peaks"]["vae_decoder"]  # all networks are open by then
    assert all(5 * 10**7 < peak < 10**9 for peak in found["peaks"].values()), found
    assert "expected at least" in stage_peaks._tried(tiny_folders[1], "100MB", 32, 1)["refused"]
