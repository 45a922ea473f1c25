"""Gates: all contributions at once, from the gradient of the velocity with respect to a gate on every branch.

A gate g of 1 leaves a branch unchanged, 0 removes it. To first order, removing part j moves the velocity by
d_j = dv/dg_j, and a group by the sum over its parts. For a random r with independent standard normal entries the mean
of (r . d)^2 is ||d||^2, so the gradients of a few random projections r . v give every group's relative velocity
error. Everything beyond first order is ignored; docs/analysis.md measures how well that works.

Notation: K projections, J parts, S states, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from edgeprune.analysis.by_block import ByBlock, MakeGates, Project
from edgeprune.analysis.contribution import Group, Key, removal, swapped
from edgeprune.common.files import digest
from edgeprune.common.progress import Steps
from edgeprune.families import Family, Swap
from edgeprune.residency.streaming import is_streamed

PROJECTIONS = 1
"""Random projections per state. The error is also averaged over the states of a trajectory and over prompts."""
_BATCH = 16
"""Most states per batch; autograd saves what it needs of every block for all of them."""


_STREAMED = 4
"""Where blocks are read when they run, memory is short: that share of the states that the metric runs at once."""


class _Gated(nn.Module):
    """Interpolates between a module (gate 1) and its replacement on removal (gate 0), with one gate per sample."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self.original, self.replacement = getattr(swap.owner, swap.attribute), swap.replacement
        self.gate = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what lies between both outputs: a tensor (B, ...), or several."""
        with_it, without = self.original(*args, **kwargs), self.replacement(*args, **kwargs)
        if isinstance(with_it, torch.Tensor):
            return self._between(with_it, without)
        return tuple(a if a is None else self._between(a, b) for a, b in zip(with_it, without, strict=True))

    def _between(self, with_it: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        """Interpolate one output (B, ...)."""
        gate = self.gate.to(with_it.dtype).view(-1, *(1,) * (with_it.dim() - 1))
        return without + gate * (with_it - without)


class Gates:
    """Estimates the velocity error of every group from one gradient per projection."""

    name = "gates"
    metrics: tuple[str, ...] | None = ("velocity",)
    backward = True
    compares = False

    def __init__(
        self, family: Family, metric: Any, mean: torch.Tensor, *, projections: int = PROJECTIONS, seed: int = 0
    ) -> None:
        self.family, self.metric, self.mean, self.projections, self.seed = family, metric, mean, projections, seed

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """Yield scores in the order of `groups`, after one pass over the states."""
        if not groups:  # a resumed run may have all scores
            return
        singles = list(dict.fromkeys(part for parts in groups for part in parts))
        slopes, norms = self._slopes(singles)
        place = {part: index for index, part in enumerate(singles)}
        for parts in groups:
            moved = slopes[:, [place[part] for part in parts]].sum(1).square().mean(0)
            error = self.metric.per_prompt(moved) / norms
            yield parts, [0.0 - float(e) for e in error]

    def _slopes(self, singles: list[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return r . dv/dg for every projection, part and state (K, J, S), and the norm of v for every prompt."""
        model = self.metric.pipe.transformer
        frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        slopes_of = self._by_block if any(map(is_streamed, self.family.blocks(model))) else self._at_once
        try:
            slopes, norms = slopes_of(singles, self._projections())
        finally:
            for parameter, needed in frozen:
                parameter.requires_grad_(needed)
        return slopes, self.metric.per_prompt(norms)

    def _projections(self) -> Project:
        """Return a function that draws r for a batch of velocities (B, C, h, w) and returns each r . v."""
        draw = torch.Generator().manual_seed(self.seed)

        def project(velocity: torch.Tensor) -> list[torch.Tensor]:
            return [
                (velocity * torch.randn(velocity.shape, generator=draw).to(velocity)).sum()
                for _ in range(self.projections)
            ]

        return project

    def _batches(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, len(self.metric.states), size)]

    def _at_once(self, singles: list[Key], project: Project) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the gradients through the whole network; return (K, J, S), and the square of each state's norm (S,)."""
        slopes, norms = [], []
        with self._gated(singles) as gated:
            for rows in self._batches(min(_BATCH, self.metric.batch)):
                states = self.metric.states[rows]
                gates = _set_gates(gated, len(states), states.device)
                with torch.enable_grad():
                    velocity = self.metric.velocity(rows)
                    norms.append(velocity.detach().flatten(1).square().sum(1))
                    projected = project(velocity)
                slopes.append(
                    torch.stack([torch.autograd.grad(p, gates, retain_graph=True)[0].detach() for p in projected])
                )
        return torch.cat(slopes, dim=-1), torch.cat(norms)

    def _by_block(self, singles: list[Key], project: Project) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same block by block, see by_block.py."""
        model, blocks = self.metric.pipe.transformer, range(len(self.family.blocks(self.metric.pipe.transformer)))
        size = max(1, self.metric.batch // _STREAMED)
        batches = ((self.metric.states[rows].shape, self.metric.inputs(rows)) for rows in self._batches(size))
        step = Steps("gradients", 2 * len(blocks), self.metric.progress)
        passes = ByBlock(self.family, model, batches, self.metric.spill, digest(singles)[:16], step)
        passes.forward()
        norms = passes.end(project)
        own = [[j for j, part in enumerate(singles) if part[0] == block] for block in blocks]

        @contextmanager
        def gated(block: int) -> Iterator[MakeGates]:
            with self._gated([singles[j] for j in own[block]]) as modules:
                yield lambda count: _set_gates(modules, count, passes.device)

        found = torch.cat(passes.backward(gated), dim=1)  # by block
        order = [j for of_block in own for j in of_block]
        return found[:, torch.tensor(order).argsort()].to(norms), norms

    @contextmanager
    def _gated(self, singles: list[Key]) -> Iterator[list[list[_Gated]]]:
        """Put a gate on every part inside the context; yield the gates of each."""

        def gates_of(part: Key) -> list[Swap]:
            swaps = removal(self.family, self.metric.pipe.transformer, [part], self.mean)
            return [replace(swap, replacement=_Gated(swap)) for swap in swaps]

        made = {part: gates_of(part) for part in singles}
        with swapped(swap for swaps in made.values() for swap in swaps):
            yield [[cast("_Gated", swap.replacement) for swap in made[part]] for part in singles]

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int, *, streamed: bool = False) -> float:
        """Return one forward pass and one backward pass per projection, whatever the number of groups.

        A streamed model's blocks run a second time for the backward pass.
        """
        return (1 + streamed + PROJECTIONS) * per_score

    @staticmethod
    def extra_bytes(stream_bytes: int, saved_bytes: int, per_score: int, batch: int, *, streamed: bool) -> int:
        """Return what autograd saves of one batch: of a streamed model, in one block."""
        size = max(1, batch // _STREAMED) if streamed else min(_BATCH, batch)
        return saved_bytes * min(size, per_score)


def _set_gates(gated: list[list[_Gated]], count: int, device: torch.device) -> torch.Tensor:
    """Open the gates of every part for a batch of `count` samples; return them (J, B)."""
    gates = torch.ones(len(gated), count, device=device, requires_grad=True)
    for modules, gate in zip(gated, gates, strict=True):
        for module in modules:
            module.gate = gate
    return gates


ESTIMATOR = Gates
