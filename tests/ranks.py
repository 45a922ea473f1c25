"""The work of each process in test_processes.py, which compares it with the work of a single process.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=1 python ranks.py FOLDER NAME ...
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from distilling import recipe, schedule, setup, states

from edgeprune.common import processes
from edgeprune.common.errors import EdgepruneError
from edgeprune.common.tensors import save_tensors
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training import distill as training
from edgeprune.training import rounding, tail, whole
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import DistillOptions, Placement, parameter_groups
from edgeprune.training.resume import local, save_state
from edgeprune.training.states import States, file_tensors
from edgeprune.training.teaching import lower
from edgeprune.training.zero import shard_of

STEPS = 4


class Killed(Exception):
    """Stands in for a kill."""


class Spoilt(Exception):
    """Training ended because a gradient was not finite."""


def train(
    folder: Path,
    name: str,
    *,
    until: int | None = None,
    spoil: int | None = None,
    accumulate: int = 1,
    offload: bool = False,
    from_states: bool = False,
    **options: Any,
) -> None:
    """Distil the tiny model of test_distill; write losses and weights to NAME.json and NAME.safetensors.

    Gradients are not finite after step `spoil`.
    """
    family, teacher, student, plan, report, pairs = setup()

    def progress(step: int, total: int, loss: float) -> None:
        if step == until:
            raise Killed
        if step == spoil:
            student.proj_out.weight.register_hook(lambda gradient: gradient * torch.nan)

    lower(family, teacher, options.get("teacher_precision", "float32"))
    chosen = DistillOptions(steps=STEPS, batch=8, rate=1e-3, schedule="cosine", **options)
    sizes: dict[str, int] = {}

    def save(path: Path, modules: Any, optimizer: Any, meta: Any) -> None:
        moments = [t for slots in optimizer.state.values() for t in slots.values()]
        averages, trained = modules["ema"].values(), modules["student"].values()
        sizes["moments_bytes"] = sum(local(t).nbytes for t in moments)
        sizes["average_bytes"] = sum(local(t).nbytes for t in averages)
        sizes["gradients_bytes"] = sum(local(t).nbytes for t in trained)  # one gradient per weight
        sizes["student_bytes"] = sum(local(shard_of(t)).nbytes for t in (*student.parameters(), *student.buffers()))
        sizes["teacher_bytes"] = sum(local(shard_of(t)).nbytes for t in (*teacher.parameters(), *teacher.buffers()))
        save_state(path, modules, optimizer, meta)

    training.save_state = save
    try:
        where, path = Placement(accumulate, offload), folder / f"{name}.state"
        if from_states:
            file = folder / f"{name}-states.safetensors"
            with processes.main_first():
                if processes.is_main():
                    save_tensors(file, file_tensors(states(teacher, plan, pairs, chosen, 1.0)))
            tail.cut(family, student, plan.first_pruned)
            lesson = tail.TailLesson(family, student, plan, States([file]), chosen, recipe(chosen))
            groups = parameter_groups(family, student, plan, report, recipe(chosen), chosen.rate)
            weights, losses = training.train(
                lesson, groups, chosen, path,
                Parallel(chosen.mixed_precision or "no", chosen.batch, where, torch.device("cpu")),
                inputs_digest="x", save_every=2, progress=progress,
            )  # fmt: skip
        else:
            weights, losses = whole.distill(
                family, teacher, student, plan, report, pairs, chosen, recipe(chosen), schedule(teacher), path,
                inputs_digest="x", placement=where, save_every=2, progress=progress,
            )  # fmt: skip
    except Killed:
        return
    except EdgepruneError as error:
        kept = f"the gradient is not finite at step 3; {folder / name}.state holds the state after step 2"
        if spoil and kept in str(error):
            raise Spoilt from None
        raise
    if processes.is_main():
        save_file(weights, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(losses))
        (folder / f"{name}.held.json").write_text(json.dumps(sizes))


def analyze(folder: Path, name: str, *, until: int | None = None) -> None:
    """Score the tiny pipeline in FOLDER/model; the report is NAME/analysis.json."""

    def progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if (what, done) == ("analyze", until):
            raise Killed

    with processes.main_first():
        ws = Workspace(folder / name, str(folder / "model"))
    with contextlib.suppress(Killed):
        run_analyze(ws, AnalyzeOptions(count=2, components=False, estimator="reuse"), progress)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""The environment that `accelerate launch` sets for a launch config with FSDP2."""


def zero(folder: Path, stage: str) -> None:
    """Train with DeepSpeed's ZeRO-2 or 3."""
    # By default ZeRO-3 does not shard parameters as small as these.
    small = {"stage": int(stage), "stage3_param_persistence_threshold": 0}

    def run(name: str, zero: dict[str, Any] | None = None, **options: Any) -> None:
        config = folder / f"zero{stage}_{name}.config"
        config.write_text(json.dumps({"zero_optimization": small | (zero or {})}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(folder, f"zero{stage}_{name}", **options)

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    run("resumed", until=3)
    if processes.is_main():
        shutil.copy(folder / f"zero{stage}_resumed.state", folder / f"zero{stage}_left.state")
    run("resumed")
    run("taken_over")  # from a state that one process saved
    run("accumulated_prefix", accumulate=2, int4_group_size=None)
    run("int8", teacher_precision="int8", gradient_checkpointing=True)
    on_cpu = {"offload_optimizer": {"device": "cpu"}} | ({"offload_param": {"device": "cpu"}} if stage == "3" else {})
    run("fresh_blocks_offloaded", on_cpu, freeze_prefix=False)
    run("bf16", mixed_precision="bf16")
    with contextlib.suppress(Spoilt):
        run("spoilt", spoil=2)
        raise AssertionError


def main(folder: Path) -> None:
    """Do what the quick tests look at."""
    analyze(folder, "two")
    analyze(folder, "begun")
    train(folder, "ddp")
    train(folder, "resumed", until=3)
    train(folder, "resumed")
    train(folder, "tail", from_states=True)
    as_large()
    shard()
    train(folder, "sharded")


def more(folder: Path) -> None:
    """Do what the slow tests look at."""
    train(folder, "accumulated", accumulate=2)
    train(folder, "prefix", int4_group_size=None)
    train(folder, "fresh_blocks", freeze_prefix=False)
    train(folder, "taken_over")  # from a state that one process saved
    as_large()
    train(folder, "ddp_large")
    shard()
    train(folder, "sharded_prefix", int4_group_size=None)
    train(folder, "sharded_tail", from_states=True)
    train(folder, "sharded_fresh_blocks", freeze_prefix=False)
    train(folder, "sharded_accumulated", accumulate=2)
    train(folder, "sharded_int8", teacher_precision="int8", gradient_checkpointing=True)
    train(folder, "sharded_taken_over", until=3)
    train(folder, "sharded_taken_over")


def as_large() -> None:
    """From now on weights are rounded again in the backward pass, as a large model's, also where they are sharded."""
    rounding._LARGE = 1


def shard() -> None:
    """Shard both models from now on."""
    os.environ |= FSDP2
    AcceleratorState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = sys.argv[2] if len(sys.argv) > 2 else ""
    if what.isdecimal():  # DeepSpeed raises many warnings of its own
        zero(Path(sys.argv[1]), what)
    else:
        warnings.simplefilter("error")
        (more if what == "more" else main)(Path(sys.argv[1]))
