"""The stage `prune`: the shorter transformer in `transformer/`, and copies of the rest of the pipeline."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from edgeprune.artefact import licensing
from edgeprune.artefact.loading import readable
from edgeprune.artefact.surgery import prune_tensor
from edgeprune.artefact.writing import copy_surroundings
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import remaining_shapes, tensor_sources
from edgeprune.stages.modulation import MODULATION, modulation_mean
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.weights import by_block, half, original_weights, write_half
from edgeprune.stages.workspace import Workspace


def run(ws: Workspace, progress: Progress = silent) -> bool:
    """Write the pruned transformer and copy the rest of the pipeline; return whether the stage ran.

    Tensors are read and written one at a time.

    Raises:
        InputError: there is no plan yet, or a file is missing or damaged.
        StaleStageError: see `Workspace.stage`.
    """
    plan = ws.plan()

    def write(key: str) -> dict[str, Any]:
        original, (mean, basis) = original_weights(ws), mean_and_basis(ws, plan, key)
        sources = tensor_sources(ws.family, ws.config, plan.kept, plan.removed, plan.modulation_rank)
        shapes = remaining_shapes(ws.family, ws.config, plan.blocks, plan.components, plan.modulation_rank)
        blocks = by_block(ws, {name: 2 * math.prod(shape) for name, shape in shapes.items()}, plan)

        def make(index: int) -> Tensors:
            return {n: half(prune_tensor(original.__getitem__, sources[n], mean, basis)) for n in blocks[index]}

        write_half(ws, plan, blocks, make, key, progress)
        copy_surroundings(ws.source, ws.out, ws.variant)
        ws.generation.save(ws.out)
        ws.manifest.license = dict(licensing.read(ws.source, ws.manifest.source))
        for entry in {name.partition("/")[0] for name in licensing.files(ws.out)}:
            ws.manifest.hash_files(ws.out, entry)
        return {}

    inputs: dict[str, Any] = {"plan": plan.to_json(), "generation": asdict(ws.generation)}
    if needs_mean(ws, plan):
        inputs["calibration"] = calibrating(ws)
    return ws.stage("prune", inputs, write)


def needs_mean(ws: Workspace, plan: PrunePlan) -> bool:
    """Return whether `prune` measures the mean modulation input; `plan` does where it projects the modulation."""
    return plan.modulation_rank is None and any(c in ws.family.norms for _, c in plan.components)


def mean_and_basis(ws: Workspace, plan: PrunePlan, key: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the mean modulation input (D) and the basis (R, D), each None where the plan does not need it.

    A projected modulation needs both; a removed norm needs the mean, which `prune` computes and caches, so that
    `distill` finds it without loading text encoders.

    Args:
        ws: the workspace.
        plan: what is pruned.
        key: digest of the inputs of `prune`.

    Raises:
        InputError: a file is missing or damaged.
    """
    if plan.modulation_rank is not None:
        path = ws.out / MODULATION
        if not path.is_file():
            raise InputError(f"{path}: no such file; run `edgeprune plan -o {ws.out} --fresh` again")
        ws.manifest.verify(ws.out, MODULATION)
        with readable(path):
            tensors = load_tensors(path)
            return tensors["mean"], tensors["basis"]
    if needs_mean(ws, plan):
        path = ws.cache / f"mean-{key[:12]}.safetensors"
        if not path.is_file():
            save_tensors(path, {"mean": modulation_mean(ws, calibrating(ws))})
        with readable(path):
            return load_tensors(path)["mean"], None
    return None, None
