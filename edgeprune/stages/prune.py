"""The stage `prune`: the shorter transformer in `transformer/`, and the rest of the pipeline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgeprune.artefact import licensing
from edgeprune.artefact.writing import copy_surroundings
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.planning.plan import PrunePlan
from edgeprune.stages import stand_ins
from edgeprune.stages.costs import surroundings_bytes
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.quantize import Ahead
from edgeprune.stages.weights import STAND_INS, PrunedWeights, by_block, leave_half, needs_mean, write_half
from edgeprune.stages.work import Subject, Work
from edgeprune.stages.workspace import Workspace


def run(
    ws: Workspace, progress: Progress = silent, *, no_half: bool = False, then: QuantizeOptions | None = None
) -> bool:
    """Write the pruned transformer, and put the rest of the pipeline beside it; return whether anything was written.

    Tensors are read and written one at a time. Whether `transformer/` is written does not change the stage's identity:
    a folder that was begun with `no_half` gets it as soon as the stage runs without.

    Args:
        ws: the workspace.
        progress: called after each shard.
        no_half: leave the weights in the original; `quantize` makes them again.
        then: options of `quantize`, if that runs next: each block is then read once for both, see `Ahead`.

    Raises:
        InputError: there is no plan yet, or a file is missing or damaged.
        StaleStageError: see `Workspace.stage`.
    """
    plan = ws.plan()

    prompts: list[str] = []

    def write(key: str) -> dict[str, Any]:
        _write_stand_ins(ws, plan, prompts, key, progress)
        if no_half:
            leave_half(ws, plan)
        else:
            _write_half(ws, plan, key, then, progress)
        copy_surroundings(ws.source, ws.out, ws.variant)
        ws.generation.save(ws.out)
        ws.manifest.license = dict(licensing.read(ws.source, ws.manifest.source))
        for entry in {name.partition("/")[0] for name in licensing.files(ws.out)}:
            ws.manifest.hash_files(ws.out, entry)
        return {}

    inputs: dict[str, Any] = {"plan": plan.to_json(), "generation": ws.generation.to_json()}
    if needs_mean(ws, plan):
        inputs["calibration"] = calibrating(ws)
    if plan.stand_ins:
        inputs["stand_in_prompts"] = prompts = stand_ins.prompts_of_fit(ws)
    if ws.stage("prune", inputs, write, lambda: _check(ws, plan, len(prompts), progress, no_half=no_half)):
        return True
    if no_half or not ws.manifest.half_in_source:
        return False
    _write_half(ws, plan, ws.manifest.stages["prune"]["inputs"], None, progress)
    ws.record()
    return True


def _check(ws: Workspace, plan: PrunePlan, prompts: int, progress: Progress, *, no_half: bool) -> None:
    """Say what pruning takes, and refuse what takes too long or too much memory; see `Workspace.check_time`."""
    ways = []
    if plan.stand_ins:
        ways = [("a plan with --stand-in none", work(ws.subject, replace(plan, stand_in_rank=None)))]
    written = 0 if no_half else plan.after.bf16_bytes
    needed = memory(ws.memory, plan, prompts)
    ws.check_time("prune", work(ws.subject, plan, prompts), ways, progress, memory=needed, written=written)


def memory(of: Memory, plan: PrunePlan, prompts: int = stand_ins.PROMPTS) -> int:
    """Return the bytes that `run` takes at least; arguments as in `work`."""
    fitted = of.evaluating(prompts, beside=stand_ins.beside_bytes(of.subject, plan)) if plan.stand_ins else 0
    return max(of.rounding(), fitted)


def work(subject: Subject, plan: PrunePlan, prompts: int = stand_ins.PROMPTS) -> Work:
    """Return the work of `run`: the original's blocks are read and those that stay are written, and what is around.

    Args:
        subject: the original.
        plan: what is removed.
        prompts: that stand-ins are fitted on, see `stand_ins.work`.
    """
    moved = plan.before.bf16_bytes + plan.after.bf16_bytes + surroundings_bytes(subject.source) // 2
    return Work(moved=moved) + stand_ins.work(subject, plan, prompts)


def _write_stand_ins(ws: Workspace, plan: PrunePlan, prompts: list[str], key: str, progress: Progress) -> None:
    """Write STAND_INS, or remove that of another plan; the manifest knows it before weights are made from it."""
    (ws.out / STAND_INS).unlink(missing_ok=True)
    if prompts:
        maps = stand_ins.fit(ws, plan, prompts, key, progress, most=stand_ins.states_of_each(ws.subject))
        save_tensors(ws.out / STAND_INS, maps)
    ws.manifest.hash_files(ws.out, STAND_INS)


def _write_half(ws: Workspace, plan: PrunePlan, key: str, then: QuantizeOptions | None, progress: Progress) -> None:
    weights, ahead = PrunedWeights(ws, plan, key), Ahead(ws, plan, then, key) if then else None
    blocks = by_block(ws, {name: 2 * math.prod(shape) for name, shape in weights.shapes.items()}, plan)

    def make(index: int) -> Tensors:
        tensors = {name: weights[name] for name in blocks[index]}
        if ahead:
            ahead.take(index, tensors)
        return tensors

    write_half(ws, plan, blocks, make, key, progress)
