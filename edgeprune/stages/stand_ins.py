"""Affine maps that stand in for removed runs of blocks, found without training.

All samples pass through the original and, beside it, through what is left of it, block by block. Where a removed run
ends, a map is fitted from the shorter model's own streams x to the original's y: a ridge regression of y - x on x in
closed form. So each map also makes up for what the maps before it leave. Cut to rank R, the best map in the metric of
the inputs is the projection of the whole map's outputs on their R principal directions (reduced-rank regression,
Izenman 1975).

Notation: D width, R rank.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from edgeprune.artefact.loading import readable
from edgeprune.artefact.surgery import structure
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, Steps
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors
from edgeprune.families.architecture import STAND_IN, STREAMS
from edgeprune.families.stand_in import StandIn
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import streams_of
from edgeprune.residency.compute import is_small
from edgeprune.residency.spill import Spill
from edgeprune.residency.stored import StoredTransformer
from edgeprune.stages.calibration import Side, calibration_states, streams_before
from edgeprune.stages.options import seen
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.weights import PrunedWeights
from edgeprune.stages.work import Subject, Work, encoding
from edgeprune.stages.workspace import Workspace

RIDGE = 0.01
"""Share of its own variance that is added to each channel's: a map must not depend on what it has hardly seen."""
PROMPTS = 28
"""Prompts that maps are fitted on, unless the user gives some. With four, the built-in model draws worse than without
maps (docs/stand-ins.md)."""
LARGE_STATES = 2
"""States of each for a large model, of which each token is a sample."""


class Regression:
    """Moments of a stream and of what a map should add to it, over all tokens, in float64."""

    def __init__(self, d: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, d, dtype=torch.float64)
        self.inner = torch.zeros(d, d, dtype=torch.float64)
        self.cross = torch.zeros(d, d, dtype=torch.float64)

    def add(self, stream: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take in a stream (B, N, D) on the processor, and what the map should make of it.

        Rows of zeros before and after are padding (`Network.run`), which no map has to know.
        """
        real = (stream != 0).any(-1) | (wanted != 0).any(-1)
        x = stream[real].double()
        y = wanted[real].double() - x
        self.count += len(x)
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        self.inner += x.T @ x
        self.cross += x.T @ y

    def solve(self, rank: int) -> Tensors:
        """Return the tensors of a `StandIn` of this rank, in float32.

        Raises:
            InputError: a stream was not finite.
        """
        if not (self.sums.isfinite().all() and self.inner.isfinite().all() and self.cross.isfinite().all()):
            raise InputError(
                "stand-ins: the original's streams are not finite in the dtype that it computes in (`edgeprune verify` "
                "tells where); plan with --stand-in none"
            )
        mean_x, mean_y = self.sums / self.count
        inner = self.inner / self.count - torch.outer(mean_x, mean_x)
        cross = self.cross / self.count - torch.outer(mean_x, mean_y)
        variance = inner.diagonal()
        floor = torch.finfo(torch.float32).eps * variance.mean() + torch.finfo(torch.float64).tiny
        inner += torch.diag(RIDGE * variance + floor)
        whole = torch.linalg.solve(inner, cross)  # (D in, D out)
        # eigh sorts upwards: the last are the directions in which the outputs vary most.
        directions = torch.linalg.eigh(whole.T @ inner @ whole).eigenvectors[:, -rank:]
        down, bias = whole @ directions, mean_y - directions @ (directions.T @ (whole.T @ mean_x))
        return {
            "down.weight": down.T.float().contiguous(),
            "up.weight": directions.float().contiguous(),
            "up.bias": bias.float(),
        }


@torch.no_grad()
def fit(
    ws: Workspace, plan: PrunePlan, prompts: list[str], key: str, progress: Progress, *, most: int | None
) -> Tensors:
    """Return the stand-ins of a plan, in float32, under their names in the shorter model.

    They are kept in the cache: a run after a kill finds them, and the same weights are made from them.

    Args:
        ws: the workspace.
        plan: what is removed.
        prompts: one trajectory of the original each.
        key: digest of what they depend on.
        progress: called after each block.
        most: states of each trajectory, which is sampled in as many steps; None for the velocity metric's.

    Raises:
        InputError: a file is missing or damaged, the original does not run in the memory that was given, or a stream
            is not finite.
    """
    path = ws.cache / f"stand-ins-{key[:12]}.safetensors"
    if path.is_file():
        with readable(path):
            return load_tensors(path)
    kept = None if is_small(ws.subject.numbers) else Spill(ws.cache / "stand-ins", identity=key)
    states = calibration_states(ws, prompts, most, spill=kept)
    without = replace(plan, stand_in_rank=None)
    shorter = StoredTransformer(ws.family, structure(ws.family, ws.config, without), PrunedWeights(ws, without, key))
    found, last = Tensors(), plan.kept[plan.stand_ins[-1]]
    step = Steps("stand-ins", last, progress)
    with ExitStack() as stack:

        def side(stored: StoredTransformer, name: str) -> Side:
            streams = partial(streams_before, ws, states, name=name, share=6)
            one = stack.enter_context(Side(stored, ws.original.dtype, lambda one: streams(one.model)))
            stored.model.to("meta")  # only blocks run from now on
            return one

        whole, left = side(copy.deepcopy(ws.original.stored), "streams"), side(shorter, "shorter")
        for block in range(last + 1):
            new = plan.kept.index(block) if block in plan.kept else None
            if new in plan.stand_ins:
                found |= _fitted(ws, plan, new, whole, left)
            if block < last:
                whole.advance(block)
                if new is not None:
                    left.advance(new)
                step()
    save_tensors(path, found)
    shutil.rmtree(ws.cache / "stand-ins", ignore_errors=True)
    return found


def _fitted(ws: Workspace, plan: PrunePlan, new: int, whole: Side, left: Side) -> Tensors:
    """Fit the maps before a block, send the shorter model's samples through them, and return their tensors."""
    names, rank = streams_of(ws.family, ws.config, plan.kept[new]), plan.stand_in_rank or 0
    map_of = {stream: stream if stream in names else names[0] for stream in STREAMS}
    sums = {name: Regression(ws.family.width(ws.config)) for name in names}
    for ours, theirs in zip(left.streams.all(), whole.streams.all(), strict=True):
        for stream, name in map_of.items():
            sums[name].add(ours[stream], theirs[stream])
    maps = {name: StandIn(ws.family.width(ws.config), rank) for name in names}
    for name, one in maps.items():
        one.load_state_dict(sums[name].solve(rank))
    left.streams.change(lambda streams: streams | {s: _mapped(maps[name], streams[s]) for s, name in map_of.items()})
    prefix = f"{ws.family.block_prefix(left.stored.model, new)}{STAND_IN}"
    return {
        f"{prefix}.{name}.{tensor}": value for name, one in maps.items() for tensor, value in one.state_dict().items()
    }


def _mapped(stand_in: StandIn, stream: torch.Tensor) -> torch.Tensor:
    """Return a stream after a map; padding, which is rows of zeros, stays padding."""
    found = stand_in(stream.float()).to(stream)
    return torch.where((stream != 0).any(-1, keepdim=True), found, 0.0)


def prompts_of_fit(ws: Workspace) -> list[str]:
    """Return the prompts that stand-ins are fitted on: those that were given to `plan` or `analyze`, else PROMPTS."""
    return calibrating(ws, count=PROMPTS)


def states_of_each(subject: Subject) -> int | None:
    """Return the most states of each prompt's trajectory; None is the usual number."""
    return None if is_small(subject.numbers) else LARGE_STATES


def beside_bytes(subject: Subject, plan: PrunePlan) -> int:
    """Return the bytes that fitting takes beside a block that runs.

    No block is in memory while the maps are fitted; the moments of two streams, and six matrices more for solving,
    count as far as they exceed the largest.
    """
    if not plan.stand_ins:
        return 0
    family, config, sizes = subject.family, subject.config, Counter[int | None]()
    for name, shape in family.tensor_shapes(config).items():
        sizes[(family.place(config, name) or (None,))[0]] += math.prod(shape)
    sizes.pop(None)
    return max(0, 8 * (2 * 2 + 6) * family.width(config) ** 2 - 2 * max(sizes.values()))


def work(subject: Subject, plan: PrunePlan, prompts: int = PROMPTS) -> Work:
    """Return the work of `fit`: trajectories of the original, then each sample through it and through what is left.

    Args:
        subject: the original.
        plan: what is removed.
        prompts: how many.
    """
    if not plan.stand_ins:
        return Work()
    images = seen(subject.generation, states_of_each(subject))
    states = VelocityError.evaluations(images, prompts)
    both = 1 + plan.after.parameters / plan.before.parameters
    sampled = VelocityError.preparing(images, prompts, subject.by_step)
    return Work(evaluations=sampled + states * subject.per_step * both) + encoding(subject, prompts + 1)
