"""The stage `quantize`: the weights of `transformer/` as INT4, in `transformer_int4/`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import INT4
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.common.tensors import Tensors
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import shorter_config
from edgeprune.quantization.quantize import CALIBRATIONS, prepare, quantize_part
from edgeprune.residency.stored import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import encode_prompts, velocity
from edgeprune.stages.modulation import is_guided
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.weights import by_block
from edgeprune.stages.workspace import Workspace

PROMPTS = 28
"""Prompts that calibrate the scales."""
GROUP_SIZES = (16, 32, 64, 128)


def run(ws: Workspace, options: QuantizeOptions, progress: Progress = silent) -> bool:
    """Write INT4 weights to `transformer_int4/`; return whether the stage ran.

    Raises:
        InputError: nothing is pruned yet, or an option is not usable.
        StaleStageError: see `Workspace.stage`.
    """
    ws.need("prune", "quantize")
    if options.calibration not in CALIBRATIONS:
        raise InputError(f"--calibration: found {options.calibration!r}, expected one of {', '.join(CALIBRATIONS)}")
    if options.group_size not in GROUP_SIZES:
        raise InputError(f"--group-size: found {options.group_size}, expected 16, 32, 64 or 128")
    plan = ws.plan()
    inputs, prompts = asdict(options), list[str]()
    if options.calibration != "none":
        inputs["prompts"] = prompts = calibrating(ws, count=PROMPTS)
    return ws.stage("quantize", inputs, lambda key: _quantize(ws, options, plan, prompts, key, progress))


def _quantize(
    ws: Workspace, options: QuantizeOptions, plan: PrunePlan, prompts: list[str], key: str, progress: Progress
) -> dict[str, Any]:
    """Quantize block by block. Without calibration one block is in memory at a time, with it the whole transformer."""
    stored = open_transformer(ws.out, quantized=False)
    empty = prepare(ws.family, copy.deepcopy(stored.model), group_size=options.group_size).state_dict()
    sizes = {n: t.numel() * (t.element_size() if n.endswith(PACKED) else 2) for n, t in empty.items()}
    blocks = by_block(ws, sizes, plan)
    calibrate = _calibration(ws, stored.load(), prompts) if prompts else None

    def make(index: int) -> Tensors:
        block = index if index < len(plan.kept) else None
        if calibrate is None:
            stored.fill(stored.names(block), None)
        quantize_part(ws.family, stored.model, block, **asdict(options), run=calibrate)
        state = stored.model.state_dict()
        tensors = {n: state[n] if n.endswith(PACKED) else state[n].half() for n in blocks[index]}
        if calibrate is not None:
            use_as_written(tensors)
        elif block is not None:
            stored.drop(block)
        return tensors

    def resume(index: int, weights: Weights) -> None:
        """Take over a block that an earlier run has written."""
        if calibrate is not None and index < len(plan.kept):
            prefix = ws.family.block_prefix(stored.model, index)
            prepare(ws.family, ws.family.blocks(stored.model)[index], prefix=prefix, group_size=options.group_size)
            use_as_written({n: weights[n] for n in blocks[index]})

    def use_as_written(tensors: Tensors) -> None:
        """Calibrate later blocks with this one as it is on disk, so that an interrupted run ends in the same bytes."""
        floats = {n: t if n.endswith(PACKED) else t.float() for n, t in tensors.items()}
        stored.model.load_state_dict(floats, strict=False, assign=True)

    ws.manifest.group_size = options.group_size
    config = shorter_config(ws.family, ws.config, plan)
    size = write_transformer(ws.out, INT4, config, blocks, make, inputs=key, found=resume, progress=progress)
    ws.manifest.hash_files(ws.out, INT4)
    return {"weights_bytes": size}


def _calibration(ws: Workspace, model: Any, prompts: list[str]) -> Callable[[], None]:
    """Return a function that runs `model` as sampling does on the original's trajectories of these prompts.

    With classifier-free guidance every state is evaluated with its prompt and with the empty one.
    """
    metric = VelocityError(ws.pipe, ws.generation, prompts, split=Split.CALIBRATION)
    conditions = [metric.condition]
    if is_guided(ws):
        empty = encode_prompts(ws.pipe, [""], ws.generation.max_sequence_length)
        conditions.append(empty[[0] * len(metric.states)])

    def calibrate() -> None:
        for start in range(0, len(metric.states), metric.batch):
            rows = slice(start, start + metric.batch)
            for condition in conditions:
                velocity(model, metric.states[rows], condition[rows], metric.sigmas[rows], metric.guidance)

    return calibrate
