"""How many threads are used: the least of affinity, quota and cores."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from edgeprune.common import threads


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
        ("nonsense\n", {"cpu.max": "x y z"}, None),
    ],
)
def test_quotas(own: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert threads._quota(tmp_path / "root", tmp_path / "own") == quota


@pytest.mark.parametrize(
    ("affinity", "physical", "quota", "expected"),
    [(8, 4, None, 4), (2, 4, None, 2), (8, 8, 1.5, 2), (8, 8, 0.2, 1), (8, None, 16.0, 8)],
)
def test_the_least_counts(
    affinity: int, physical: int | None, quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(threads, "_quota", lambda root, own: quota)
    assert threads.usable() == expected
