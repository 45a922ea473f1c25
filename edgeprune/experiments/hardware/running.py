"""Runs checks in a process of their own, one after the other; a new process follows one that died or took too long.

A worker writes one line of JSON when a check begins and one when it ends, after which the next one begins. What the
vendors print goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import Check, Failed, LeftOut, checks

MOST_SECONDS = 10 * 60
"""Of all checks together."""
_START_SECONDS = 60
"""Of a worker: imports, and CUDA's start."""
_AFTER = 5
"""Seconds between the end of the last check and that of the run."""
_LATE = "no time was left"
Result = dict[str, Any]
"""`name`, `what`, `outcome` (ok, failed or left out), `figure` and `seconds`."""


def device_of(kind: str) -> str:
    """Return torch's name for the device of a kind of machine."""
    return {"gpu": "cuda", "mac": "mps"}[kind]


def missing(one: Check) -> str | None:
    """Return which package a check lacks, and why; None if it has all of them."""
    import importlib

    for name in one.needs:
        try:
            importlib.import_module(name)
        except Exception as error:  # a vendor's package that is broken may raise anything
            return f"{name}: {line(error)}"
    return None


def line(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (Failed, LeftOut)) else f"{type(error).__name__}: {text}"


def attempt(one: Check, place: Place) -> Result:
    """Run a check and return its result; it does not raise."""
    began = time.monotonic()
    result = {"name": one.name, "what": one.what}
    try:
        if why := missing(one):
            raise LeftOut(why)
        outcome, figure = "ok", one.run(place)
    except LeftOut as reason:
        outcome, figure = "left out", line(reason)
    except ModuleNotFoundError as error:  # of others: what a package of `needs` needs itself
        outcome = "failed" if (error.name or "edgeprune").startswith("edgeprune") else "left out"
        figure = line(error)
    except Exception as error:
        outcome, figure = "failed", line(error)
    return result | {"outcome": outcome, "figure": figure, "seconds": round(time.monotonic() - began, 1)}


def work(kind: str, names: list[str], place: Place) -> None:
    """Be a worker: run these checks, and write lines to the real standard output."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print
    known = checks(kind)
    for name in names:
        print(json.dumps({"begins": name}), file=lines, flush=True)
        result = attempt(known[name], place)
        print(json.dumps(result), file=lines, flush=True)
        if result["outcome"] == "failed" and "CUDA error" in result["figure"]:
            return  # every later call of this process would fail; another one goes on


def run_all(
    kind: str,
    names: list[str],
    *,
    most_seconds: float = MOST_SECONDS,
) -> Iterator[Result]:
    """Run checks and yield their results.

    Args:
        kind: of machine, see registry.py.
        names: of the checks.
        most_seconds: of all of them; those that might end later are left out.
    """
    known, ends = checks(kind), time.monotonic() + most_seconds - _AFTER
    todo = list(names)
    with tempfile.TemporaryDirectory(prefix="edgeprune-", ignore_cleanup_errors=True) as scratch:
        while todo and time.monotonic() < ends:
            for result in _Worker(kind, todo, Path(scratch) / str(len(todo)), ends).results(known):
                todo.remove(result["name"])
                yield result
    for name in todo:
        yield _ended(known[name], "left out", _LATE, 0.0)


class _Worker:
    """A process that runs checks, and what it writes."""

    def __init__(self, kind: str, names: list[str], scratch: Path, ends: float) -> None:
        self.names, self.ends = names, ends
        command = [sys.executable, "-m", __package__, kind, "--worker", str(scratch), *names]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                self.lines.put(text)
        self.lines.put(None)

    def results(self, known: dict[str, Check]) -> Iterator[Result]:
        """Yield results until the process ends, or has to be ended."""
        try:
            left = list(self.names)
            name, limit, began = left[0], _START_SECONDS, time.monotonic()
            while left:
                result = self._next(min(began + limit, self.ends) - time.monotonic())
                if result is None or result.get("timeout"):
                    late = time.monotonic() >= self.ends
                    why = f"took more than {limit} s" if result else f"its process ended with {self.process.wait()}"
                    outcome = "left out" if late else "failed"
                    figure = _LATE if late else why
                    yield _ended(known[name], outcome, figure, time.monotonic() - began)
                    return
                if "begins" in result:
                    name, limit, began = result["begins"], known[result["begins"]].seconds, time.monotonic()
                    continue
                left.remove(result["name"])
                yield result
                if left:
                    name, limit, began = left[0], _START_SECONDS, time.monotonic()
                if result["outcome"] == "failed" and "CUDA error" in result["figure"]:
                    return
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join(timeout=10)

    def _next(self, seconds: float) -> Result | None:
        """Return the next line; `timeout` where none comes in time, and None where the process has ended."""
        try:
            text = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return {"timeout": True}
        found: Result | None = None if text is None else json.loads(text)
        return found


def _ended(one: Check, outcome: str, figure: str, seconds: float) -> Result:
    return {"name": one.name, "what": one.what, "outcome": outcome, "figure": figure, "seconds": round(seconds, 1)}
