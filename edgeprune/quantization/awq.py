"""AWQ for adaLN transformers: input channels that matter get finer INT4 steps, at no cost when running.

A layer's input channel i is divided by s_i and its weights multiplied by it, which changes what rounding hurts and
nothing else (Lin et al., arXiv 2306.00978). The division is folded into whatever makes the input, as the family says:
adaLN's modulation rows, x * (1 + scale) + shift, or the values that attention averages. Row scaling is exact for a
producer that is rounded itself, since INT4 groups never cross rows. s = mean|x|^alpha, alpha by search.
What it leaves out: layers behind a nonlinearity (the MLP's second one), where nothing can take the division.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.families.base import ScalingGroup
from edgeprune.quantization.int4 import round_int4

ALPHAS = tuple(i / 10 for i in range(1, 10))


@torch.no_grad()
def best_divisor(
    weights: list[torch.Tensor], inputs: list[torch.Tensor], group_sizes: list[int]
) -> torch.Tensor | None:
    """The divisor (I) with the least rounding error; None if none beats plain rounding.

    Args:
        weights: of the layers that read the divided values, each (O, I).
        inputs: what each layer reads, (R, I).
        group_sizes: each layer's INT4 group.
    """
    magnitude = torch.cat(inputs).abs().mean(0).clamp_min(1e-6)

    def error(s: torch.Tensor) -> float:
        terms = zip(weights, inputs, group_sizes, strict=True)
        return sum(float(((round_int4(w * s, size) / s - w) @ x.T).square().sum()) for w, x, size in terms)

    best, least = None, error(torch.ones_like(magnitude))
    for alpha in ALPHAS:
        s = magnitude**alpha
        s = s / (s.max() * s.min()).sqrt()
        if (found := error(s)) < least:
            best, least = s, found
    return best


@torch.no_grad()
def fold(block: nn.Module, group: ScalingGroup, s: torch.Tensor) -> None:
    """Divide what the group's consumers read by s (I) and multiply their weights by it; in place."""
    for name in group.consumers:
        block.get_submodule(name).weight.mul_(s)  # type: ignore[operator]
    for producer in group.producers:
        layer, rows = block.get_submodule(producer.layer), slice(*producer.rows)
        assert isinstance(layer, nn.Linear) and layer.bias is not None
        layer.weight[rows] /= s[:, None]
        one = float(producer.one_plus)
        layer.bias[rows] = (layer.bias[rows] + one) / s - one
