"""All contributions at once, from the gradient of the velocity with respect to a gate on every branch.

A gate g of 1 leaves a branch as it is, 0 removes it. To first order, removing part j moves the velocity by
d_j = dv/dg_j, and a group by the sum over its parts. For a random r with independent standard normal entries the mean
of (r . d)^2 is ||d||^2, so the gradients of a few random projections r . v give every group's relative velocity
error. What it leaves out: everything beyond first order; docs/analysis.md has how far that goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from edgeprune.analysis.contribution import Group, Key, removal, swapped
from edgeprune.families import Family
from edgeprune.families.base import Swap

PROJECTIONS = 1
"""Of each state; the states of a trajectory and the prompts are averaged over as well."""
_BATCH = 16
"""States at once: what the backward pass needs of every block is held."""


class _Gated(nn.Module):
    """Between a module (gate 1) and what stands in its place when it is removed (gate 0), sample by sample."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self.original, self.replacement = getattr(swap.owner, swap.attribute), swap.replacement
        self.gate = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As both: a tensor (B, ...), or several."""
        with_it, without = self.original(*args, **kwargs), self.replacement(*args, **kwargs)
        if isinstance(with_it, torch.Tensor):
            return self._between(with_it, without)
        return tuple(a if a is None else self._between(a, b) for a, b in zip(with_it, without, strict=True))

    def _between(self, with_it: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        gate = self.gate.view(-1, *(1,) * (with_it.dim() - 1))
        return without + gate * (with_it - without)


class Gates:
    """See the module."""

    name = "gates"
    metrics: tuple[str, ...] | None = ("velocity",)
    backward = True

    def __init__(
        self, family: Family, metric: Any, mean: torch.Tensor, *, projections: int = PROJECTIONS, seed: int = 0
    ) -> None:
        self.family, self.metric, self.mean, self.projections, self.seed = family, metric, mean, projections, seed

    def estimate(self, groups: list[Group]) -> Iterator[tuple[Group, list[float]]]:
        """In the given order, after one pass."""
        if not groups:  # a run that goes on may have all
            return
        singles = list(dict.fromkeys(part for parts in groups for part in parts))
        slopes = self._slopes(singles)
        place = {part: index for index, part in enumerate(singles)}
        for parts in groups:
            moved = slopes[:, [place[part] for part in parts]].sum(1).square().mean(0)
            error = moved.view(-1, self.metric.count).sum(0).sqrt() / self.metric.norms
            yield parts, [0.0 - float(e) for e in error]

    def _slopes(self, singles: list[Key]) -> torch.Tensor:
        """r . dv/dg for every projection, part and state: (K, J, S)."""
        model, draw = self.metric.pipe.transformer, torch.Generator().manual_seed(self.seed)
        gated = [
            [replace(swap, replacement=_Gated(swap)) for swap in removal(self.family, model, [part], self.mean)]
            for part in singles
        ]
        frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        slopes = []
        try:
            with swapped(swap for mine in gated for swap in mine):
                for start in range(0, len(self.metric.states), _BATCH):
                    rows = slice(start, start + _BATCH)
                    gates = torch.ones(len(singles), len(self.metric.states[rows]), requires_grad=True)
                    for mine, gate in zip(gated, gates, strict=True):
                        for swap in mine:
                            cast("_Gated", swap.replacement).gate = gate
                    with torch.enable_grad():
                        found = self.metric.velocity(rows)
                        projected = [
                            (found * torch.randn(found.shape, generator=draw).to(found)).sum()
                            for _ in range(self.projections)
                        ]
                    slopes.append(
                        torch.stack([torch.autograd.grad(p, gates, retain_graph=True)[0].detach() for p in projected])
                    )
        finally:
            for parameter, needed in frozen:
                parameter.requires_grad_(needed)
        return torch.cat(slopes, dim=-1)

    @staticmethod
    def evaluations(groups: list[Group], blocks: int, per_score: int) -> float:
        """Once forward, and once backward for each projection, however many groups there are."""
        return (1 + PROJECTIONS) * per_score

    @staticmethod
    def held(stream_bytes: int, saved_bytes: int, per_score: int) -> int:
        """One batch, ready to go backward."""
        return saved_bytes * min(_BATCH, per_score)


ESTIMATOR = Gates
