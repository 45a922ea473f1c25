"""Kill the stages of a tiny pipeline at random moments, and list what was lost: `python tests/kills.py --kills 200`.

One process imports everything once and forks. A fork runs one stage and gets SIGKILL after a random time; this repeats
a few times, then the stage may finish. After each kill every JSON and safetensors file in its place must be readable.
At the end all files must equal those of an undisturbed run, and no finished work may have been done twice. The last
line of stdout is JSON: what was tried, and every loss.

Not covered: power failures, and export formats other than ONNX (tests/export/test_resume_export.py).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from edgeprune.data import encode, settings
from edgeprune.data.settings import CacheOptions, settings_of
from edgeprune.export import to_onnx, unfinished
from edgeprune.planning.options import PlanOptions
from edgeprune.residency import shards
from edgeprune.sampling.generation import Generation
from edgeprune.stages import analyze, distill, plan, prune, quantize, states, tail
from edgeprune.stages.options import AnalyzeOptions, DataOptions, QuantizeOptions
from edgeprune.stages.original import Original
from edgeprune.stages.workspace import Workspace
from edgeprune.training import distill as training
from edgeprune.training import whole
from edgeprune.training.recipe import DistillOptions

STAGES = ("analyze", "distill", "tail", "quantize", "export", "cache")
STEPS, SAVE_EVERY = 12, 3
WARM = {"distill": "accelerate", "tail": "accelerate", "quantize": "nncf"}
"""Modules that a stage imports; imported before forking, or every fork would import them again."""
PER_STAGE = 5
"""Kills of a stage before it may finish."""
SCRATCH = (".tmp", ".partial")
"""Suffixes of files and folders that are not finished."""


@dataclass
class Outcome:
    """What was tried, and what was lost."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    rounds: int = 0
    files_read: int = 0
    losses: list[str] = field(default_factory=list)


def run_stage(stage: str, source: Path, folder: Path) -> None:
    """Run one stage as its command would; `folder/log` gets a line for every finished piece of work."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    def noted(function: Callable[..., Any], words: Callable[..., tuple[object, ...]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            note(*words(*args))
            return result

        return call

    def progress(what: str, done: int = 0, total: int = 0, _: str = "") -> None:
        if (what == "analyze" and done > first.setdefault(what, done)) or what == "distill":
            note(stage, done)

    first: dict[str, int] = {}
    shards.SHARD_BYTES = 1  # many shards
    shard, network = shards.ShardWriter, unfinished.Unfinished
    shard.put = noted(  # type: ignore[method-assign]
        shard.put, lambda self, index, _: ("shard", json.loads((self.folder / "unfinished.json").read_text()), index)
    )
    network.finish = noted(network.finish, lambda _, name, __: ("network", name))  # type: ignore[method-assign]
    settings.SHARD_BYTES, settings._ROUND = 1, 2
    encode.save_tensors = noted(  # type: ignore[attr-defined]
        encode.save_tensors, lambda path, *_: ("encoded", path.relative_to(folder))
    )
    states.SMALL_LOT = 2
    states.save_tensors = noted(  # type: ignore[attr-defined]
        states.save_tensors, lambda path, *_: ("states", path.relative_to(folder))
    )
    tail.train = functools.partial(training.train, save_every=SAVE_EVERY)  # type: ignore[attr-defined]
    distill.distill = functools.partial(whole.distill, save_every=SAVE_EVERY)  # type: ignore[attr-defined]
    if stage == "cache":
        generation, options = Generation.load(source), CacheOptions("shapes", 9)
        identity = settings_of(source, generation, options, computed_in="")
        load = functools.partial(Original(source).encoding, drawing=False)
        encode.make_cache(load, source, folder / "encoded", identity, generation, options)
        return
    if stage == "export":
        to_onnx.export(folder / "small", folder / "onnx")
        return
    ws = Workspace(folder / ("tail" if stage == "tail" else "small"), str(source))
    if stage == "analyze":
        analyze.run(ws, AnalyzeOptions(count=2), progress)
    elif stage == "distill":
        plan.run(ws, PlanOptions(keep=0.95, protect_first=1, protect_last=0))
        prune.run(ws, progress)
        distill.run(ws, DistillOptions(steps=STEPS, batch=2), DataOptions("shapes", 8), progress)
    elif stage == "tail":
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws, progress)
        from_states = DistillOptions(steps=STEPS, batch=2, states=6, rounds=2, prefix_calibration="feedback")
        distill.run(ws, from_states, DataOptions("shapes", 8), progress)
    else:
        quantize.run(ws, QuantizeOptions(), progress)


def forked(act: Callable[[], None], kill_after_s: float | None = None) -> bool:
    """Run in a fork; return whether it finished before it was killed.

    Raises:
        RuntimeError: it failed on its own.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # a fork that has finished stays a zombie until waitpid
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit code {status}")
    return status == 0


def unreadable(folder: Path) -> tuple[int, list[str]]:
    """Count the finished JSON and safetensors files; return also those that cannot be read, with the error."""
    count, bad = 0, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.endswith(SCRATCH) for part in name.parts) or path.suffix not in (".json", ".safetensors"):
            continue
        count += 1
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt") as file:
                    file.keys()
        except Exception as error:
            bad.append(f"{name}: {error}")
    return count, bad


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file by its name.

    The log is left out, and in the manifest the seconds of the stages.
    """
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "log"):
        data = path.read_bytes()
        if path.name == "edgeprune.json":
            manifest = json.loads(data)
            for stage in manifest["stages"].values():
                del stage["seconds"]
            data = json.dumps(manifest).encode()
        out[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return out


def done_twice(log: Path) -> list[str]:
    """Return the log lines of work that was finished twice; only training steps between two saves may be."""
    lines = Counter(log.read_text().splitlines())
    between = {f"{stage} {step}" for stage in ("distill", "tail") for step in range(STEPS) if step % SAVE_EVERY}
    return [line for line, count in lines.items() if count > 1 and line not in between]


def torment(folder: Path, kills: int, stages: tuple[str, ...], rng: random.Random) -> Outcome:
    """Kill stages in as many rounds as it takes, and compare each round with an undisturbed run.

    Args:
        folder: an empty folder.
        kills: how many kills there shall be at least.
        stages: the members of STAGES to kill, in the order of STAGES.
        rng: draws the moments.
    """
    from tiny import tiny_pipeline

    outcome, source, undisturbed = Outcome(), folder / "source", folder / "undisturbed"
    forked(lambda: tiny_pipeline(source) and None)
    undisturbed.mkdir()
    seconds: dict[str, float] = {}
    for stage in stages:
        began = time.monotonic()
        forked(functools.partial(run_stage, stage, source, undisturbed))
        seconds[stage] = time.monotonic() - began
    expected = contents(undisturbed)
    while outcome.kills.total() < kills:
        outcome.rounds += 1
        place = folder / f"round-{outcome.rounds}"
        place.mkdir()
        for stage in stages:
            act, left = functools.partial(run_stage, stage, source, place), kills - outcome.kills.total()
            tries = min(PER_STAGE, -(-left // (len(stages) - stages.index(stage))))
            for _ in range(tries):
                outcome.runs += 1
                if forked(act, rng.uniform(0, 0.9) * seconds[stage]):
                    break
                outcome.kills[stage] += 1
                count, bad = unreadable(place)
                outcome.files_read += count
                outcome.losses += [f"round {outcome.rounds}, {stage}: not readable: {line}" for line in bad]
            else:
                outcome.runs += 1
                forked(act)
        actual = contents(place)
        differ = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
        outcome.losses += [f"round {outcome.rounds}: not as undisturbed: {name}" for name in differ]
        outcome.losses += [f"round {outcome.rounds}: done twice: {line}" for line in done_twice(place / "log")]
    return outcome


def main() -> None:
    """Read the options, kill, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")  # vendors' deprecations
    for stage in args.stages:
        if stage in WARM:
            importlib.import_module(WARM[stage])
    with tempfile.TemporaryDirectory(prefix="edgeprune-kills-") as folder:
        outcome = torment(Path(folder), args.kills, tuple(args.stages), random.Random(args.seed))
    print(json.dumps({**vars(outcome), "kills": outcome.kills.total(), "by_stage": dict(outcome.kills)}))


if __name__ == "__main__":
    main()
