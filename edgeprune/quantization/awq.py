"""AWQ for adaLN transformers: input channels that matter get finer INT4 steps, at no cost at run time.

AWQ divides a layer's input channel i by s_i and multiplies its weights by s_i, which changes only the rounding error
(Lin et al., arXiv 2306.00978). The division is folded into the layers that produce the input, which the family names:
adaLN's modulation rows, x * (1 + scale) + shift, or the values that attention averages. Scaling the rows of a producer
is exact even if the producer is rounded too, since INT4 groups never cross rows. s = mean|x|^alpha, alpha by search.
Layers behind a nonlinearity (the MLP's second one) stay as they are: nothing before them can absorb the division.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.families import ScalingGroup
from edgeprune.quantization.int4 import round_int4

ALPHAS = tuple(i / 10 for i in range(1, 10))


@torch.no_grad()
def best_divisor(
    weights: list[torch.Tensor], inputs: list[torch.Tensor], group_sizes: list[int]
) -> torch.Tensor | None:
    """Return the divisor (I) with the least rounding error; None if none beats plain rounding.

    Args:
        weights: the weight (O, I) of each layer that reads the divided values.
        inputs: samples (R, I) of each layer's input.
        group_sizes: the INT4 group size of each layer.
    """
    magnitude = torch.cat(inputs).abs().mean(0).clamp_min(1e-6)

    def error(s: torch.Tensor) -> float:
        terms = zip(weights, inputs, group_sizes, strict=True)
        return sum(float(((round_int4(w * s, size) / s - w) @ x.T).square().sum()) for w, x, size in terms)

    best, least = None, error(torch.ones_like(magnitude))
    for alpha in ALPHAS:
        s = magnitude**alpha
        s = s / (s.max() * s.min()).sqrt()
        if (loss := error(s)) < least:
            best, least = s, loss
    return best


@torch.no_grad()
def fold(block: nn.Module, group: ScalingGroup, s: torch.Tensor) -> None:
    """Divide the input of the group's consumers by s (I) and multiply their weights by s, in place."""
    for name in group.consumers:
        block.get_submodule(name).weight.mul_(s)  # type: ignore[operator]
    for producer in group.producers:
        layer, rows = block.get_submodule(producer.layer), slice(*producer.rows)
        assert isinstance(layer, nn.Linear) and layer.bias is not None
        layer.weight[rows] /= s[:, None]
        one = float(producer.one_plus)
        layer.bias[rows] = (layer.bias[rows] + one) / s - one
