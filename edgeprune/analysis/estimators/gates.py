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
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from edgeprune.analysis.contribution import Group, Key, removal, swapped
from edgeprune.families import Family, Swap
from edgeprune.residency.streaming import is_streamed

PROJECTIONS = 1
"""Random projections per state. The error is also averaged over the states of a trajectory and over prompts."""
_BATCH = 16
"""Most states per batch; autograd saves what it needs of every block for all of them."""
_STREAMED_BATCH = 2
"""Most states per batch where blocks are read for each batch: memory is short, and every block's inputs are kept."""


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


class _RunAgain(nn.Module):
    """A block that autograd saves only the inputs of; the backward pass runs it again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns."""
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


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
        model, draw = self.metric.pipe.transformer, torch.Generator().manual_seed(self.seed)
        frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        streamed = any(map(is_streamed, self.family.blocks(model)))
        slopes, norms, batch = [], [], min(_STREAMED_BATCH if streamed else _BATCH, self.metric.batch)
        try:
            with self._gated(model, singles) as gated:
                for start in range(0, len(self.metric.states), batch):
                    states = self.metric.states[rows := slice(start, start + batch)]
                    gates = torch.ones(len(singles), len(states), device=states.device, requires_grad=True)
                    for modules, gate in zip(gated, gates, strict=True):
                        for module in modules:
                            module.gate = gate
                    with torch.enable_grad():
                        velocity = self.metric.velocity(rows)
                        norms.append(velocity.detach().flatten(1).square().sum(1))
                        projected = [
                            (velocity * torch.randn(velocity.shape, generator=draw).to(velocity)).sum()
                            for _ in range(self.projections)
                        ]
                    slopes.append(
                        torch.stack([torch.autograd.grad(p, gates, retain_graph=True)[0].detach() for p in projected])
                    )
        finally:
            for parameter, needed in frozen:
                parameter.requires_grad_(needed)
        return torch.cat(slopes, dim=-1), self.metric.per_prompt(torch.cat(norms))

    @contextmanager
    def _gated(self, model: nn.Module, singles: list[Key]) -> Iterator[list[list[_Gated]]]:
        """Put a gate on every part inside the context; yield the gates of each.

        A streamed network's blocks are read and run a second time for the backward pass, one after the other, so that
        neither their weights nor what autograd saves of them stays in memory.
        """

        def gates_of(part: Key) -> list[Swap]:
            swaps = removal(self.family, model, [part], self.mean)
            return [replace(swap, replacement=_Gated(swap)) for swap in swaps]

        made = {part: gates_of(part) for part in singles if part[1] is not None}
        blocks = self.family.blocks(model)
        again = [
            replace(self.family.removal(model, index, None, self.mean)[0], replacement=_RunAgain(block))
            for index, block in enumerate(blocks)
            if is_streamed(block)
        ]
        with swapped(again), set_checkpoint_early_stop(False):
            made |= {part: gates_of(part) for part in singles if part[1] is None}
            with swapped(swap for swaps in made.values() for swap in swaps):
                yield [[cast("_Gated", swap.replacement) for swap in made[part]] for part in singles]

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int) -> float:
        """Return one forward pass and one backward pass per projection, whatever the number of groups."""
        return (1 + PROJECTIONS) * per_score

    @staticmethod
    def extra_bytes(stream_bytes: int, saved_bytes: int, per_score: int, batch: int) -> int:
        """Return what autograd saves of one batch."""
        return saved_bytes * min(_BATCH, batch, per_score)


ESTIMATOR = Gates
