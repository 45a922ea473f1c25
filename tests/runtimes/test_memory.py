"""Memory rows: the same names everywhere, the peak of networks that take turns, and no leak over a thousand loads."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import heavy
import numpy as np
import pytest
import torch

from edgeprune import runtimes
from edgeprune.common import heap
from edgeprune.experiments.full_size.measuring import resident_bytes
from edgeprune.runtimes import memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_memory_rows_say_how() -> None:
    rows = memory.read()
    assert rows["peak_rss_bytes"].bytes >= rows["rss_bytes"].bytes * 0.9 > 1e6
    assert all(r.how for r in rows.values())
    if sys.platform == "linux":
        assert rows["anon_bytes"].bytes + rows["file_bytes"].bytes == pytest.approx(rows["rss_bytes"].bytes, rel=0.05)
    assert memory.parse_kib("VmHWM:\t   12 kB\nThreads:\t3\n") == {"VmHWM": 12288}


def test_memory_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")  # imported before the patch: it checks the platform too
    monkeypatch.setattr(sys, "platform", "darwin")
    assert {"rss_bytes", "peak_rss_bytes"} <= set(memory.read())


@linux
def test_a_kernel_without_vmhwm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in gVisor: the peak comes from getrusage, and the split works."""
    real = memory.parse_kib
    monkeypatch.setattr(memory, "parse_kib", lambda text: {k: v for k, v in real(text).items() if k != "VmHWM"})
    rows = memory.read()
    assert "getrusage" in rows["peak_rss_bytes"].how
    assert rows["peak_rss_bytes"].bytes >= rows["rss_bytes"].bytes * 0.9
    assert memory.Meter().rows()["peak_bytes"] == rows["peak_rss_bytes"]


# ------------------------------------------------------------------------------------- the split


def levels(resident: int, private: int, peak: int) -> dict[str, memory.Reading]:
    values = {"rss_bytes": resident, "anon_bytes": private, "file_bytes": resident - private, "peak_rss_bytes": peak}
    return {name: memory.Reading(value, name) for name, value in values.items()}


def split(monkeypatch: pytest.MonkeyPatch, *moments: dict[str, memory.Reading]) -> dict[str, memory.Reading]:
    """Return a meter's rows for readings before, at the beginning and end of an opening, and after it."""
    told = iter([*moments, moments[-1]])
    monkeypatch.setattr(memory, "read", lambda: next(told))
    meter = memory.Meter()
    with meter.opening():
        pass
    return meter.rows()


def test_the_parts_add_up_to_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anonymous memory goes from 10 to 60 by opening, mapped from 40 to 70 by use; then comes a peak of 200."""
    before, opened, used = levels(50, 10, 50), levels(100, 60, 100), levels(140, 70, 200)
    rows = split(monkeypatch, before, before, opened, used)
    assert {name: rows[name].bytes for name in memory.SPLIT} == {
        "peak_bytes": 200, "runtime_overhead_bytes": 50, "weights_bytes": 80, "activations_bytes": 70,
    }  # fmt: skip
    assert not rows["activations_bytes"].how.startswith("at most") and all(r.how for r in rows.values())


def test_a_peak_while_opening_bounds_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    before, opened = levels(50, 10, 50), levels(100, 60, 300)
    rows = split(monkeypatch, before, before, opened, levels(100, 60, 300))
    assert rows["activations_bytes"].bytes == 200 and rows["activations_bytes"].how.startswith("at most")


def test_a_mac_is_judged_by_its_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def footprint(now: int, peak: int) -> dict[str, memory.Reading]:
        extra = {"footprint_bytes": now, "peak_footprint_bytes": peak}
        return levels(999, 1, 9999) | {name: memory.Reading(value, name) for name, value in extra.items()}

    rows = split(monkeypatch, footprint(10, 10), footprint(10, 10), footprint(40, 40), footprint(45, 90))
    assert [rows[name].bytes for name in memory.SPLIT] == [90, 10, 30, 50]
    assert "footprint" in rows["weights_bytes"].how


def test_without_a_split_of_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(now: int, peak: int) -> dict[str, memory.Reading]:
        return {n: r for n, r in levels(now, 0, peak).items() if "rss" in n}

    rows = split(monkeypatch, plain(10, 10), plain(10, 10), plain(40, 40), plain(45, 90))
    assert [rows[name].bytes for name in memory.SPLIT] == [90, 10, 30, 50]


# ------------------------------------------------------------------------------------- fresh processes

STAGE = 64_000_000


def run(code: str, *arguments: Any) -> Any:
    """Run code in a new process and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ROWS = """
import json, sys
from edgeprune import runtimes
with runtimes.load(sys.argv[1], "ort", threads=1, memory=int(sys.argv[2])) as model:
    model.generate("two red circles", steps=1)
    print(json.dumps({name: row.bytes for name, row in model.memory().items()}))
"""


@linux
def test_networks_that_take_turns_need_the_largest_not_the_sum(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Three stages of 64 MB: the peak falls by two of them. The rest is the library's code."""
    model = heavy.folder(tiny_folders[1], tmp_path / "model", STAGE)
    whole, low = (run(ROWS, model, most) for most in (10**10, 7 * STAGE))
    for rows in (whole, low):
        assert rows["peak_bytes"] == sum(rows[name] for name in memory.SPLIT[1:])
    assert 2.9 * STAGE < whole["weights_bytes"] < 4.5 * STAGE
    assert 0.9 * STAGE < low["weights_bytes"] < 2.5 * STAGE
    assert whole["peak_bytes"] - low["peak_bytes"] > 1.7 * STAGE, (whole, low)


LEAK = """
import gc, json, os, sys
from edgeprune import runtimes
from edgeprune.runtimes import memory
held = []
for _ in range(int(sys.argv[2])):
    with runtimes.load(sys.argv[1], sys.argv[3], threads=1) as model:
        model.generate("two red circles", steps=1)
    del model
    gc.collect(0)
    counts = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")]
    held.append([memory.read()["rss_bytes"].bytes, *counts])
print(json.dumps(held))
"""


@linux
@pytest.mark.parametrize(
    ("runtime", "loads", "bound"),
    [
        ("ort", 100, 500_000),
        pytest.param("ort", 1000, 20_000, marks=pytest.mark.slow),
        pytest.param("openvino", 300, 100_000, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_after_many_loads(
    tiny_folders: tuple[Path, Path], tmp_path: Path, runtime: str, loads: int, bound: int
) -> None:
    """Over the second half, memory grows by less than `bound` bytes per load; files and threads do not grow.

    One load has 6 MB of weights. The bounds allow one growth of the heap; growth of 16 MB that stays was observed.
    """
    model = heavy.folder(tiny_folders[1], tmp_path / "model", 2_000_000)
    held = np.asarray(run(LEAK, model, loads, runtime))[loads // 2 :]
    slope = np.polyfit(np.arange(len(held)), held[:, 0], 1)[0]
    assert slope < bound, f"{slope:.0f} bytes per load, {held[::10, 0].tolist()}"
    assert held[-1, 1:].tolist() == held[0, 1:].tolist()


@pytest.mark.filterwarnings("ignore")
def test_every_runtime_gives_the_rows(tiny_folders: tuple[Path, Path]) -> None:
    for folder, name in ((tiny_folders[0], "eager"), (tiny_folders[1], "ort"), (tiny_folders[1], "openvino")):
        with runtimes.load(folder, name) as model:
            model.generate("x", steps=1)
            rows = model.memory()
            assert set(memory.SPLIT) <= set(rows) and all(rows[n].how for n in memory.SPLIT), name
            assert rows["weights_bytes"].bytes >= 0 and rows["peak_bytes"].bytes > 1e6


def test_rows_of_a_gpu_come_from_the_allocator_and_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.runtimes import eager, gpu

    device = torch.device("cuda", 1)
    cuda = SimpleNamespace(max_memory_reserved={device: 900}.get, memory_reserved={device: 850}.get)
    monkeypatch.setattr(gpu, "nvml_row", dict)
    rows = eager.gpu_rows(cuda, device, 600)
    assert {n: r.bytes for n, r in rows.items()} == {"peak_bytes": 900, "weights_bytes": 600, "activations_bytes": 300}
    assert "NVML does not report" in rows["peak_bytes"].how and {r.place for r in rows.values()} == {"gpu"}
    monkeypatch.setattr(gpu, "nvml_row", lambda: {"gpu_process_bytes": memory.Reading(1000, "NVML", "gpu")})
    rows = eager.gpu_rows(cuda, device, 600)
    assert (rows["runtime_overhead_bytes"].bytes, rows["peak_bytes"].bytes) == (150, 1050)


def test_opening_the_torch_reference_imports_no_library(tiny_folders: tuple[Path, Path]) -> None:
    """Otherwise libraries would count as weights, and importing them as load time."""
    code = f"""
import sys
from edgeprune import runtimes
runtimes.prepare("eager")
before = set(sys.modules)
with runtimes.load({str(tiny_folders[0])!r}):
    new = set(sys.modules) - before
    print([m for m in new if m.startswith(("diffusers.pipelines.stable_", "transformers.models."))])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------- what is freed

HOLES = """if True:
    import ctypes, sys
    from contextlib import nullcontext
    from edgeprune.common import heap
    from edgeprune.runtimes import memory
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(31 << 20))  # from here on glibc keeps pieces of this size
    with heap.returned() if sys.argv[1] == "returned" else nullcontext():
        large, small = [], []
        for _ in range(50):
            large.append(libc.malloc(4 << 20))
            small.append(libc.malloc(100 << 10))
            ctypes.memset(large[-1], 1, 4 << 20)
        before = memory.read()["anon_bytes"].bytes
        for piece in large:
            libc.free(piece)
        print(before - memory.read()["anon_bytes"].bytes)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_freed_pieces_go_back() -> None:
    """200 MB are freed between small allocations that stay."""
    freed = {
        how: int(subprocess.check_output([sys.executable, "-c", HOLES, how], text=True)) for how in ("returned", "kept")
    }
    assert freed["returned"] > 190e6 > 50e6 > freed["kept"]


def test_large_pages_are_asked_for_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "THP_MEM_ALLOC_ENABLE"  # PyTorch's; the system may or may not have such pages
    monkeypatch.setenv(variable, "0")
    heap.large_pages()
    assert os.environ[variable] == "0"
    monkeypatch.delenv(variable)
    heap.large_pages()
    assert os.environ[variable] == "1"


@linux
def test_memory_of_a_process_and_its_children() -> None:
    psutil = pytest.importorskip("psutil")

    child = "import sys; held = b'1' * 100_000_000; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert resident_bytes(process.pid) > 100e6
        for each in psutil.Process(process.pid).children():
            each.kill()
    assert resident_bytes(process.pid) == 0
