"""Training of the tail from states, round by round: the models that make states are not in memory while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.surgery import structure
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress
from edgeprune.common.tensors import Tensors
from edgeprune.families.architecture import STAND_IN
from edgeprune.planning.plan import PrunePlan
from edgeprune.residency.compute import is_small
from edgeprune.residency.stored import StoredTransformer
from edgeprune.stages.states import Maker
from edgeprune.stages.weights import PrunedWeights
from edgeprune.stages.workspace import Workspace
from edgeprune.training import lora
from edgeprune.training.distill import train
from edgeprune.training.parallel import Parallel, sharded
from edgeprune.training.recipe import HERE, DistillOptions, Placement, Recipe, adapt, parameter_groups
from edgeprune.training.resume import steps_done
from edgeprune.training.states import States
from edgeprune.training.tail import TailLesson, cut
from edgeprune.training.teaching import load_teacher, narrowed
from edgeprune.training.trained import rank_of

_OPTION = "--states (of compress: --train-states)"
_USES = 4
"""How often each state is trained on by default."""
_MOST = 2048
"""States of a round by default: 47 GB of those of SD3.5 Large at 1024x1024."""


def defaults(options: DistillOptions, plan: PrunePlan, *, frozen: bool) -> dict[str, Any]:
    """Return the fields of a `Recipe` about states that follow from the plan and the options.

    A large model is trained from states where its prefix is frozen.

    Args:
        options: of the training.
        plan: what is pruned.
        frozen: whether the prefix is.
    """
    states, rounds = options.states, options.rounds or 1
    if states is None and frozen and _has_prefix(plan) and not is_small(plan.before.parameters):
        wanted = -(-options.steps * options.batch // _USES)
        rounds = options.rounds or min(options.steps, -(-wanted // _MOST))
        states = -(-wanted // rounds)
    # With features, the teacher's later blocks would run in every step.
    return {"states": states, "rounds": rounds, "lambda_feature": 0.0} if states else {}


def check(plan: PrunePlan, options: DistillOptions, recipe: Recipe, placement: Placement = HERE) -> None:
    """Refuse states where nothing is frozen, and options that would have no effect.

    Raises:
        InputError: the prefix is trained, or there is none; or an option is about states, and there are none, or about
            what states do without.
    """
    if not recipe.states:
        if (options.rounds, options.prefix_calibration) != (None, None):
            raise InputError(f"--rounds and --prefix-calibration are about states; give {_OPTION}, or omit them")
        return
    if not recipe.freeze_prefix:
        raise InputError(f"{_OPTION}: states come from a frozen prefix; omit --no-freeze-prefix, or give 0")
    if not _has_prefix(plan):
        found = "nothing is pruned" if plan.first_pruned else "the first block is pruned"
        raise InputError(f"{_OPTION}: {found}, so no prefix is frozen whose states could be kept; give 0")
    if recipe.prefix_calibration != "none" and options.int4_group_size is None:
        raise InputError("--prefix-calibration: nothing is rounded with --no-quantize-aware; omit one of them")
    if not recipe.lambda_feature and (placement.teacher_offload or options.teacher_precision != "float32"):
        raise InputError(
            "--teacher-offload, --teacher-precision: no teacher is in memory while a tail is trained from states; omit "
            "them, or give --lambda-feature or --states 0"
        )


def _has_prefix(plan: PrunePlan) -> bool:
    return 0 < plan.first_pruned < plan.num_blocks


def train_tail(
    ws: Workspace,
    plan: PrunePlan,
    maker: Maker,
    options: DistillOptions,
    recipe: Recipe,
    path: Path,
    key: str,
    placement: Placement,
    progress: Progress,
) -> tuple[Tensors, list[float]]:
    """Train the tail; return its averaged tensors (in rank 0 only) and the loss of each step.

    Args:
        ws: the workspace.
        plan: what is pruned.
        maker: makes the states of each round.
        options: of the training.
        recipe: what those options became that follow from the plan and the model.
        path: of the training's state.
        key: digest of everything that the result depends on.
        placement: where it runs.
        progress: called after each step and each file of states.

    Raises:
        InputError, DiskError: see `Maker.make`.
        EdgepruneError, Stopped: see `training.distill.train`.
    """
    found: tuple[Tensors, list[float]] = {}, []
    parallel = Parallel(options.mixed_precision or "no", options.batch, placement, ws.original.compute.device)
    ws.original.release()  # everything is encoded; states read the blocks one by one
    for number in range(recipe.rounds):
        until = options.steps * (number + 1) // recipe.rounds
        done = steps_done(path, key)
        if done >= until and number + 1 < recipe.rounds:
            continue
        files = None
        if done < until:
            with processes.main_first():
                files = maker.make(number)
            ws.original.release()
        ws.original.compute.collect()  # of the round before, too
        found = _round(ws, plan, files, options, recipe, path, key, until, parallel, progress)
    return lora.merged(found[0]), found[1]


def _round(
    ws: Workspace,
    plan: PrunePlan,
    files: list[Path] | None,
    options: DistillOptions,
    recipe: Recipe,
    path: Path,
    key: str,
    until: int,
    parallel: Parallel,
    progress: Progress,
) -> tuple[Tensors, list[float]]:
    """Train from the states of a round. What that holds is free afterwards, and the state is on the disk."""
    student = _student(ws, plan, widened=rank_of(options.train) is None or options.mixed_precision == "no")
    adapt(ws.family, student, plan, recipe, options)
    lesson = TailLesson(
        ws.family, student, plan, None if files is None else States(files), options, recipe,
        _teacher(ws, plan, options) if recipe.lambda_feature else None,
    )  # fmt: skip
    groups = parameter_groups(ws.family, student, plan, ws.report(), recipe, options.rate)
    return train(
        lesson, groups, options, path, parallel, inputs_digest=key, until=until,
        progress=lambda done, total, loss: progress("distill", done, total, f"loss {loss:.4f}"),
    )  # fmt: skip


def _student(ws: Workspace, plan: PrunePlan, *, widened: bool) -> Any:
    """Return the pruned model from its first trained block on.

    Args:
        ws: the workspace.
        plan: what is pruned.
        widened: to float32; else a large model keeps the dtype of its file, except for stand-ins.
    """
    model = structure(ws.family, ws.config, plan)
    stored = StoredTransformer(ws.family, model, PrunedWeights(ws, plan, ws.manifest.stages["prune"]["inputs"]))
    cut(ws.family, model, plan.first_pruned)
    dtype = torch.float32 if widened or is_small(plan.before.parameters) else None
    state = {name: stored.read(name, dtype).clone() for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, module in model.named_modules():
        if name.endswith(STAND_IN):
            module.float()
    return model.eval()


def _teacher(ws: Workspace, plan: PrunePlan, options: DistillOptions) -> Any:
    """Return the original's blocks from the first pruned one on."""
    stored = open_transformer(ws.source, quantized=False, variant=ws.variant)
    cut(ws.family, stored.model, plan.first_pruned)
    narrow = narrowed(options, plan, sharded=sharded())
    return load_teacher(stored, options.teacher_precision, narrow=narrow)
