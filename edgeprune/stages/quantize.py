"""The stage `quantize`: the pruned transformer's weights as INT4, in `transformer_int4/`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from edgeprune.artefact.manifest import INT4
from edgeprune.artefact.surgery import structure
from edgeprune.artefact.writing import begun, write_transformer
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import shorter_config
from edgeprune.quantization.quantize import quantize_part
from edgeprune.residency.compute import is_small
from edgeprune.residency.shards import mark_of
from edgeprune.residency.spill import Spill
from edgeprune.residency.weights import Weights
from edgeprune.stages.calibration import calibration_states, streams_before
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import COUNTED_BY, QuantizeOptions, halvings, seen
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.rounder import Rounder, calibrated_in, int4_blocks, taken
from edgeprune.stages.states import PREFIX
from edgeprune.stages.weights import check_pruned, open_pruned
from edgeprune.stages.work import CALIBRATED, Subject, Work, encoding
from edgeprune.stages.workspace import Workspace

PROMPTS = 28
"""Prompts that calibrate."""


def run(ws: Workspace, options: QuantizeOptions, progress: Progress = silent, *, counted_by: str = COUNTED_BY) -> bool:
    """Write INT4 weights to `transformer_int4/`; return whether the stage ran.

    Args:
        ws: the workspace.
        options: of the stage.
        progress: called after each block.
        counted_by: the option that sets how many prompts calibrate, for messages.

    Raises:
        InputError: nothing is pruned yet, or an option is not usable, see `QuantizeOptions.chosen`.
        StaleStageError: see `Workspace.stage` and `check_pruned`.
    """
    ws.need("prune", "quantize")
    plan, given = ws.plan(), options.calibration
    rounded = ws.training_option("int4_group_size") == options.group_size
    options, prompts = settled(ws, options)
    inputs = options.to_json() | ({"prompts": prompts} if prompts else {})

    def check() -> None:
        check_pruned(ws)
        seen_so = "quantize: training saw these weights rounded to the nearest"
        if rounded and options.calibration == "feedback":
            progress(
                f"{seen_so}. Feedback makes up for errors that it has learned to live with, and usually loses more"
            )
        if options.calibration == "none" != given:
            progress(f"{seen_so}, so they are again (--calibration none)")
        check_time(ws, options, plan, len(prompts), progress, counted_by=counted_by)

    return ws.stage("quantize", inputs, lambda key: _quantize(ws, options, plan, prompts, key, progress), check)


def settled(ws: Workspace, options: QuantizeOptions) -> tuple[QuantizeOptions, list[str]]:
    """Return the options with what follows from the training and the model, and the prompts that calibrate.

    Raises:
        InputError: see `run`.
    """
    rounded = ws.training_option("int4_group_size") == options.group_size
    options = options.chosen(rounded=rounded, large=not is_small(ws.subject.numbers))
    if options.calibration == "none":
        return options, []
    return options, calibrating(ws, count=options.count or PROMPTS)[: options.count]


class Ahead:
    """Quantizes blocks while `prune` makes them, into the shards that `quantize` would write: each is read only once.

    `quantize` finds these shards, and makes those that an interrupted run left out.

    Args:
        ws: the workspace.
        plan: what is pruned.
        options: of `quantize`, without calibration.
        pruned: digest of the inputs of `prune`.
    """

    def __init__(self, ws: Workspace, plan: PrunePlan, options: QuantizeOptions, pruned: str) -> None:
        assert options.calibration == "none", "blocks are rounded one by one here, and no model runs"
        self.family, self.options, self.model = ws.family, options, structure(ws.family, ws.config, plan)
        self.blocks = int4_blocks(ws, plan, self.model, options.group_size)
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
        self.writer.add(taken(self.model, names))
        if block is not None:
            self.family.blocks(self.model)[block].to("meta")


def _quantize(
    ws: Workspace, options: QuantizeOptions, plan: PrunePlan, prompts: list[str], key: str, progress: Progress
) -> dict[str, Any]:
    """Quantize block by block, with one block in memory at a time."""
    stored = open_pruned(ws)
    blocks = int4_blocks(ws, plan, stored.model, options.group_size)
    streams, dtype = None, calibrated_in(stored, ws.original.dtype)
    if prompts:
        large = not is_small(ws.subject.numbers)
        kept = Spill(ws.cache / "calibration", identity=key) if large else None
        states = calibration_states(ws, prompts, options.states, spill=kept)
        stored.fill(stored.names(None), dtype)  # not before: the original has run, and is not in memory any more
        streams = streams_before(ws, states, stored.model)
        stored.model.to("meta")  # only blocks run from now on

    rounder = Rounder(
        stored, blocks, options.group_size, options.calibration, streams, dtype, _seen_prefix(ws, options, progress)
    )
    ws.manifest.group_size = options.group_size
    config = shorter_config(ws.family, ws.config, plan)
    try:
        size = write_transformer(
            ws.out, INT4, config, blocks, rounder.make, inputs=key, found=rounder.found, progress=progress
        )
    finally:
        if streams is not None:
            streams.close()
    shutil.rmtree(ws.cache / "calibration", ignore_errors=True)
    ws.manifest.hash_files(ws.out, INT4)
    return {"weights_bytes": size}


def _seen_prefix(ws: Workspace, options: QuantizeOptions, progress: Progress) -> Weights | None:
    """Return the rounded prefix that the trained tail has seen; None if there is none of this group size."""
    seen, count = ws.manifest.stages.get("distill", {}).get("prefix"), ws.plan().first_pruned
    if not isinstance(seen, dict):
        return None
    if seen.get("group_size") != options.group_size:
        progress(
            f"quantize: the tail was trained behind a prefix in groups of {seen.get('group_size')}; in groups of "
            f"{options.group_size} it is another one"
        )
        return None
    if mark_of(ws.cache / PREFIX).get("inputs") != seen.get("inputs"):
        progress(f"quantize: {ws.cache / PREFIX} is not what the tail was trained behind; the prefix is rounded again")
        return None
    progress(
        f"quantize: the first {count} blocks stay as the trained tail saw them, rounded with --prefix-calibration "
        f"{seen.get('calibration')}; --calibration {options.calibration} is of the others"
    )
    return Weights(ws.cache / PREFIX)


def check_time(
    ws: Workspace,
    options: QuantizeOptions,
    plan: PrunePlan,
    count: int,
    progress: Progress,
    *,
    counted_by: str = COUNTED_BY,
) -> None:
    """Say what calibration on `count` prompts takes, and refuse what takes too long; see `Workspace.check_time`."""
    ways = [(f"{counted_by} {fewer}", work(ws.subject, options, plan, fewer)) for fewer in halvings(count)]
    if count:
        if counted_by == COUNTED_BY:  # the --states of `compress` is the analysis's, too
            ways.append((f"{counted_by} 1 --states 1", work(ws.subject, replace(options, states=1), plan, 1)))
        ways.append(("--calibration none", work(ws.subject, options, plan, 0)))
    total, needed = work(ws.subject, options, plan, count), memory(ws.memory, count)
    ws.check_time("quantize", total, ways, progress, memory=needed, written=plan.after.int4_bytes)


def memory(of: Memory, prompts: int) -> int:
    """Return the bytes that `run` takes at least; 0 prompts are no calibration."""
    return max(of.evaluating(prompts), of.rounding(calibrated=True)) if prompts else of.rounding()


def work(subject: Subject, options: QuantizeOptions, plan: PrunePlan, prompts: int) -> Work:
    """Return the work of `run`.

    Args:
        subject: the original.
        options: of the quantization.
        plan: what is pruned.
        prompts: how many calibrate; 0 without calibration.
    """
    sizes, numbers = plan.after, plan.after.parameters
    alone = Work(
        moved=sizes.bf16_bytes + sizes.int4_bytes,
        rounded=numbers * CALIBRATED[options.calibration if prompts else "none"],
    )
    if not prompts:
        return alone
    images = seen(subject.generation, options.states)
    states = VelocityError.evaluations(images, prompts)
    # Trajectories of the original, then each sample twice through what is left of it, with both texts at every level.
    sampled = VelocityError.preparing(images, prompts, subject.by_step)
    twice = states * subject.per_step * 2 * numbers / plan.before.parameters
    return alone + Work(evaluations=sampled + twice) + encoding(subject, prompts + 1)
