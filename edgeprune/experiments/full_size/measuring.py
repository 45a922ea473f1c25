"""Runs a command in a process of its own and measures its time, its peak memory, and the bytes it reads and writes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY_S = 1.0


@dataclass(frozen=True)
class Stage:
    """Time and memory of one process and those that it started."""

    seconds: float
    peak_bytes: int
    read_bytes: int | None = None
    """As the command counts them; None where it does not."""
    written_bytes: int | None = None
    killed: bool = False
    """It was killed because its time was over."""


def run(
    *arguments: str,
    so_far: Callable[[Stage], None] = lambda stage: None,
    caches: Path | None = None,
    kill_after_s: float | None = None,
) -> Stage:
    """Run `edgeprune …` in a process of its own.

    Args:
        arguments: of the command; `--json` makes it say what it has read and written, if it counts that.
        so_far: called once a second with the time and peak up to then.
        caches: a folder in place of the user's, which may hold hashes of the files.
        kill_after_s: kill it after so many seconds.

    Raises:
        SystemExit: the command failed; it has printed its own message.
    """
    print("$ edgeprune", *arguments, flush=True)
    began = time.monotonic()
    environment = os.environ | ({} if caches is None else {"XDG_CACHE_HOME": str(caches)})
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, "-m", "edgeprune.cli", *arguments], env=environment, stdout=told)
        with (
            ended_after(process, kill_after_s) as over,
            sampled_peak(process.pid, lambda peak: so_far(Stage(time.monotonic() - began, peak))) as peak,
        ):
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - began
        told.seek(0)
        lines = told.read().splitlines()
    print(*lines, sep="\n", flush=True)
    moved = json.loads(lines[-1]) if "--json" in arguments and lines else {}
    process.returncode = code = os.waitstatus_to_exitcode(status)  # it has been waited for
    killed = over.is_set() and code == -signal.SIGKILL
    found = max(peak(), usage.ru_maxrss * 1024)
    stage = Stage(seconds, found, moved.get("read_bytes"), moved.get("written_bytes"), killed)
    so_far(stage)
    if code and not killed:
        raise SystemExit(f"edgeprune {arguments[0]} ended with {code}")
    return stage


@contextlib.contextmanager
def ended_after(process: subprocess.Popen[bytes], seconds: float | None) -> Iterator[threading.Event]:
    """Kill a process if it still runs after so many seconds; None lets it run.

    Yields:
        Whether its time is over.
    """
    over = threading.Event()

    def kill() -> None:
        over.set()
        process.kill()

    timer = threading.Timer(seconds or 0.0, kill)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield over
    finally:
        timer.cancel()


@contextlib.contextmanager
def sampled_peak(pid: int, each: Callable[[int], None]) -> Iterator[Callable[[], int]]:
    """Sample `resident_bytes` of a process once a second until the block ends.

    Args:
        pid: the process.
        each: called after each sample with the largest one.

    Yields:
        A function that returns the largest sample.
    """
    largest, end = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not end.wait(_EVERY_S):
            largest = max(largest, resident_bytes(pid))
            each(largest)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: largest
    finally:
        end.set()
        watcher.join()


def resident_bytes(pid: int) -> int:
    """Return the bytes in memory of a process and all that it started; 0 if it has ended.

    Memory that processes share counts once for each.
    """
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended after it was listed
                total += each.memory_info().rss
    return total
