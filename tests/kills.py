"""Kills the stages of a tiny pipeline at random moments and says what was lost: `python tests/kills.py --kills 200`.

One process imports everything once and forks; a fork runs one stage and gets SIGKILL after a random time, again and
again, until it is left to end. After each kill every JSON and safetensors file in place must be readable; at the end
all files must be those of an undisturbed run, and nothing that was finished may have been done twice. The last line of
stdout is JSON: what was tried, and every loss. What it leaves out: a machine that loses power, and other formats than
ONNX (tests/test_resume_export.py).
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

from edgeprune.data import encode
from edgeprune.data.encode import CacheOptions
from edgeprune.export import to_onnx, unfinished
from edgeprune.residency import weights
from edgeprune.sampling.generation import Generation
from edgeprune.stages import pipeline
from edgeprune.stages.pipeline import AnalyzeOptions, DataOptions, PlanOptions, QuantizeOptions, Workspace
from edgeprune.training import distill
from edgeprune.training.recipe import DistillOptions

STAGES = ("analyze", "distill", "quantize", "export", "cache")
STEPS, SAVE_EVERY = 12, 3
WARM = {"distill": "accelerate", "quantize": "nncf"}
"""What a stage would import by itself, in every fork."""
PER_STAGE = 5
"""Kills of a stage before it is left to end."""
SCRATCH = (".tmp", ".partial")
"""Endings of folders that are not in their place yet."""


@dataclass
class Found:
    """What was tried and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    rounds: int = 0
    files_read: int = 0
    losses: list[str] = field(default_factory=list)


def run_stage(stage: str, source: Path, folder: Path) -> None:
    """One stage as the command of its name runs it; `folder/log` gets a line for every piece that is finished."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    def noted(function: Callable[..., Any], words: Callable[..., tuple[object, ...]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            note(*words(*args))
            return found

        return call

    def progress(what: str, done: int = 0, total: int = 0, _: str = "") -> None:
        if (what == "analyze" and done > first.setdefault(what, done)) or what == "distill":
            note(what, done)

    first: dict[str, int] = {}
    weights.SHARD_BYTES = 1  # many shards
    shard, network = weights.ShardWriter, unfinished.Unfinished
    shard.put = noted(  # type: ignore[method-assign]
        shard.put, lambda self, index, _: ("shard", json.loads((self.folder / "unfinished.json").read_text()), index)
    )
    network.finish = noted(network.finish, lambda _, name, __: ("network", name))  # type: ignore[method-assign]
    encode.SHARD_BYTES, encode._ROUND = 1, 2
    encode.save_tensors = noted(  # type: ignore[attr-defined]
        encode.save_tensors, lambda path, *_: ("encoded", path.parent.name, path.name)
    )
    pipeline.distill = functools.partial(distill.distill, save_every=SAVE_EVERY)  # type: ignore[attr-defined]
    if stage == "cache":
        generation, options = Generation.load(source), CacheOptions("shapes", 9)
        settings = encode.settings_of(source, generation, options)
        load = functools.partial(pipeline.load_encoders, source)
        encode.make_cache(load, source, folder / "encoded", settings, generation, options)
        return
    if stage == "export":
        to_onnx.export(folder / "small", folder / "onnx")
        return
    ws = Workspace(folder / "small", str(source))
    if stage == "analyze":
        pipeline.run_analyze(ws, AnalyzeOptions(count=2), progress)
    elif stage == "distill":
        pipeline.run_plan(ws, PlanOptions(keep=0.95, protect_first=1, protect_last=0))
        pipeline.run_prune(ws, progress)
        pipeline.run_distill(ws, DistillOptions(steps=STEPS, batch=2), DataOptions("shapes", 8), progress)
    else:
        pipeline.run_quantize(ws, QuantizeOptions(), progress)


def forked(act: Callable[[], None], kill_after_s: float | None = None) -> bool:
    """Run in a fork; True if it came to its end, False if it was killed before.

    Raises:
        RuntimeError: it failed by itself.
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
        os.kill(child, signal.SIGKILL)  # one that has ended is still there to be waited for
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit code {status}")
    return status == 0


def unreadable(folder: Path) -> tuple[int, list[str]]:
    """How many JSON and safetensors files are in their place, and which of them cannot be read."""
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
    """Hash by name of every file but the log and the times of files; of the manifest, without the stages' seconds."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("log", "hashes.json")):
        data = path.read_bytes()
        if path.name == "edgeprune.json":
            manifest = json.loads(data)
            for stage in manifest["stages"].values():
                del stage["seconds"]
            data = json.dumps(manifest).encode()
        out[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return out


def done_twice(log: Path) -> list[str]:
    """Pieces that were finished more than once; steps between two saves may be."""
    lines = Counter(log.read_text().splitlines())
    between = {f"distill {step}" for step in range(STEPS) if step % SAVE_EVERY}
    return [line for line, count in lines.items() if count > 1 and line not in between]


def torment(folder: Path, kills: int, stages: tuple[str, ...], rng: random.Random) -> Found:
    """Kill at least so often, in as many rounds as it takes.

    Args:
        folder: an empty one.
        stages: those of STAGES that get kills, in their order.
    """
    from tiny import tiny_pipeline

    found, source, whole = Found(), folder / "source", folder / "whole"
    forked(lambda: tiny_pipeline(source) and None)
    whole.mkdir()
    seconds: dict[str, float] = {}
    for stage in stages:
        began = time.monotonic()
        forked(functools.partial(run_stage, stage, source, whole))
        seconds[stage] = time.monotonic() - began
    expected = contents(whole)
    while found.kills.total() < kills:
        found.rounds += 1
        place = folder / f"round-{found.rounds}"
        place.mkdir()
        for stage in stages:
            act, left = functools.partial(run_stage, stage, source, place), kills - found.kills.total()
            mine = min(PER_STAGE, -(-left // (len(stages) - stages.index(stage))))
            for _ in range(mine):
                found.runs += 1
                if forked(act, rng.uniform(0, 0.9) * seconds[stage]):
                    break
                found.kills[stage] += 1
                count, bad = unreadable(place)
                found.files_read += count
                found.losses += [f"round {found.rounds}, {stage}: not readable: {line}" for line in bad]
            else:
                found.runs += 1
                forked(act)
        got = contents(place)
        differ = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
        found.losses += [f"round {found.rounds}: not as undisturbed: {name}" for name in differ]
        found.losses += [f"round {found.rounds}: done twice: {line}" for line in done_twice(place / "log")]
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads would not survive a fork
    warnings.simplefilter("ignore")  # vendors' deprecations
    for stage in given.stages:
        if stage in WARM:
            importlib.import_module(WARM[stage])
    with tempfile.TemporaryDirectory(prefix="edgeprune-kills-") as folder:
        found = torment(Path(folder), given.kills, tuple(given.stages), random.Random(given.seed))
    print(json.dumps({**vars(found), "kills": found.kills.total(), "by_stage": dict(found.kills)}))


if __name__ == "__main__":
    main()
