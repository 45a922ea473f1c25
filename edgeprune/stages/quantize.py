"""The stage `quantize`: the pruned transformer's weights as INT4, in `transformer_int4/`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.artefact.manifest import INT4
from edgeprune.artefact.surgery import structure
from edgeprune.artefact.writing import begun, write_transformer
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import shorter_config
from edgeprune.quantization.quantize import CALIBRATIONS, prepare, quantize_part
from edgeprune.residency.compute import is_small
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.stages.calibration import calibration_states, streams_before
from edgeprune.stages.costs import transformer_bytes
from edgeprune.stages.options import QuantizeOptions, halvings, seen
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.weights import by_block, check_pruned, open_pruned
from edgeprune.stages.work import CALIBRATED, Subject, Work, encoding
from edgeprune.stages.workspace import Workspace

PROMPTS = 28
"""Prompts that calibrate."""
GROUP_SIZES = (16, 32, 64, 128)


def run(ws: Workspace, options: QuantizeOptions, progress: Progress = silent) -> bool:
    """Write INT4 weights to `transformer_int4/`; return whether the stage ran.

    Raises:
        InputError: nothing is pruned yet, or an option is not usable.
        StaleStageError: see `Workspace.stage` and `check_pruned`.
    """
    ws.need("prune", "quantize")
    _check(options)
    plan = ws.plan()
    inputs, prompts = options.to_json(), list[str]()
    if options.calibration != "none":
        inputs["prompts"] = prompts = calibrating(ws, count=options.count or PROMPTS)[: options.count]

    def check() -> None:
        check_pruned(ws)
        if prompts:
            ws.check_memory()
        _check_time(ws, options, plan, len(prompts), progress)

    return ws.stage("quantize", inputs, lambda key: _quantize(ws, options, plan, prompts, key, progress), check)


class Ahead:
    """Quantizes blocks while `prune` makes them, into the shards that `quantize` would write: each is read only once.

    `quantize` finds these shards, and makes those that an interrupted run left out.

    Args:
        ws: the workspace.
        plan: what is pruned.
        options: of `quantize`, without calibration.
        pruned: digest of the inputs of `prune`.

    Raises:
        InputError: an option is not usable.
    """

    def __init__(self, ws: Workspace, plan: PrunePlan, options: QuantizeOptions, pruned: str) -> None:
        _check(options)
        self.family, self.options, self.model = ws.family, options, structure(ws.family, ws.config, plan)
        self.blocks = _int4_blocks(ws, plan, self.model, options)
        key = ws.key("quantize", options.to_json(), after=[pruned])
        self.writer = begun(ws.out, INT4, self.blocks, key)

    def take(self, index: int, tensors: Tensors) -> None:
        """Quantize one entry of `by_block`: a block in half precision, or last what is outside the blocks."""
        names = list(self.blocks[index])
        if self.writer.has(self.writer.shard_of(names[0])):
            return
        block = index if index + 1 < len(self.blocks) else None
        self.model.load_state_dict(tensors, strict=False, assign=True)
        quantize_part(self.family, self.model, block, group_size=self.options.group_size)
        self.writer.add(_taken(self.model, names))
        if block is not None:
            self.family.blocks(self.model)[block].to("meta")


def _check(options: QuantizeOptions) -> None:
    if options.calibration not in CALIBRATIONS:
        raise InputError(f"--calibration: found {options.calibration!r}, expected one of {', '.join(CALIBRATIONS)}")
    if options.group_size not in GROUP_SIZES:
        raise InputError(f"--group-size: found {options.group_size}, expected 16, 32, 64 or 128")
    if options.calibration == "none" and (options.count, options.states) != (None, None):
        raise InputError("--count and --states are about calibration; give --calibration feedback, or omit them")


def _int4_blocks(ws: Workspace, plan: PrunePlan, model: nn.Module, options: QuantizeOptions) -> list[dict[str, int]]:
    """Return the bytes of the quantized tensors of `model`, the pruned structure, as `by_block` does."""
    empty = prepare(ws.family, copy.deepcopy(model), group_size=options.group_size).state_dict()
    sizes = {n: t.numel() * (t.element_size() if n.endswith(PACKED) else 2) for n, t in empty.items()}
    return by_block(ws, sizes, plan)


def _taken(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Return tensors of a model as they are stored: what is not packed in half precision."""
    state = model.state_dict()
    return {name: state[name] if name.endswith(PACKED) else state[name].half() for name in names}


def _quantize(
    ws: Workspace, options: QuantizeOptions, plan: PrunePlan, prompts: list[str], key: str, progress: Progress
) -> dict[str, Any]:
    """Quantize block by block, with one block in memory at a time."""
    stored = open_pruned(ws)
    blocks = _int4_blocks(ws, plan, stored.model, options)
    streams = None
    if prompts:
        stored.fill(stored.names(None))
        large = not is_small(ws.subject.numbers)
        kept = Spill(ws.cache / "calibration", identity=key) if large else None
        streams = streams_before(ws, calibration_states(ws, prompts, options.states, spill=kept), stored.model)

    def make(index: int) -> Tensors:
        block = index if index < len(plan.kept) else None
        run, calls = None, 1
        if streams is None or block is not None:
            stored.fill(stored.names(block), torch.float32 if streams else None)
        if streams is not None and block is not None:
            run, calls = partial(streams.run, ws.family.blocks(stored.model)[block]), streams.batches
        quantize_part(
            ws.family, stored.model, block, group_size=options.group_size, calibration=options.calibration, run=run,
            calls=calls,
        )  # fmt: skip
        tensors = _taken(stored.model, blocks[index])
        if block is not None:
            advance(block, tensors)
        return tensors

    def resume(index: int, weights: Weights) -> None:
        """Take over a block that an earlier run has written."""
        if streams is not None and index < len(plan.kept):
            prefix = ws.family.block_prefix(stored.model, index)
            prepare(ws.family, ws.family.blocks(stored.model)[index], prefix=prefix, group_size=options.group_size)
            advance(index, {n: weights[n] for n in blocks[index]})

    def advance(block: int, tensors: Tensors) -> None:
        """Calibrate later blocks with this one as it is on disk, so that an interrupted run ends in the same bytes."""
        if streams is not None:
            floats = {n: t if n.endswith(PACKED) else t.float() for n, t in tensors.items()}
            stored.model.load_state_dict(floats, strict=False, assign=True)
            streams.run(ws.family.blocks(stored.model)[block], advance=True)
        stored.drop(block)

    ws.manifest.group_size = options.group_size
    config = shorter_config(ws.family, ws.config, plan)
    try:
        size = write_transformer(ws.out, INT4, config, blocks, make, inputs=key, found=resume, progress=progress)
    finally:
        if streams is not None:
            streams.close()
    shutil.rmtree(ws.cache / "calibration", ignore_errors=True)
    ws.manifest.hash_files(ws.out, INT4)
    return {"weights_bytes": size}


def _check_time(ws: Workspace, options: QuantizeOptions, plan: PrunePlan, count: int, progress: Progress) -> None:
    """Say what calibration on `count` prompts takes, and refuse what takes too long; see `Workspace.check_time`."""
    ways = [(f"--count {fewer}", work(ws.subject, options, plan, fewer)) for fewer in halvings(count)]
    if count:
        ways.append(("--count 1 --states 1", work(ws.subject, replace(options, states=1), plan, 1)))
        ways.append(("--calibration none", work(ws.subject, options, plan, 0)))
    memory = transformer_bytes(ws.family, ws.config) if count else 0
    total = work(ws.subject, options, plan, count)
    ws.check_time("quantize", total, ways, progress, memory=memory, written=plan.after.int4_bytes)


def work(subject: Subject, options: QuantizeOptions, plan: PrunePlan, prompts: int) -> Work:
    """Return the work of `run`.

    Args:
        subject: the original.
        options: of the quantization.
        plan: what is pruned.
        prompts: how many calibrate; 0 without calibration.

    Raises:
        InputError: an option is not usable.
    """
    _check(options)
    sizes, numbers = plan.after, plan.after.parameters
    alone = Work(
        moved=sizes.bf16_bytes + sizes.int4_bytes,
        rounded=numbers * CALIBRATED[options.calibration if prompts else "none"],
    )
    if not prompts:
        return alone
    states = VelocityError.evaluations(seen(subject.generation, options.states), prompts)
    # Trajectories of the original, then each sample twice through what is left of it.
    evaluations = states * subject.per_step * (1 + 2 * numbers / plan.before.parameters)
    return alone + Work(evaluations=evaluations) + encoding(subject, prompts + 1)
