"""Error feedback: what rounding a weight's column costs is made up for in the columns that are still to be rounded.

What a change D of the weights does to the output is, squared and in the mean over inputs x, trace(D H D'), with their
second moments H = E[x x']. Columns are rounded one after another. Column j's error times U_jk / U_jj is taken off every
later column k, which is the change of these columns that costs least; U is the upper Cholesky factor of the inverse of
H (GPTQ, Frantar et al., arXiv 2210.17323). The steps are given and stay as they are, so the columns may come in any
order: those with the most input come first, while many are left to make up for them.

Notation: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from edgeprune.common.errors import InputError
from edgeprune.families import Shape

DAMPING = 0.01
"""Share of the mean moment that is added to each: inputs that were not seen must not cost nothing."""
CHANNELS = 4096
"""Most inputs that make up for one another. More are split evenly: a factor takes the square of them in memory, and the
cube in time.
"""
ROWS = 16384
"""Most rows of a layer's inputs that its moments are the mean of."""
_AT_ONCE = 128
"""Columns that are rounded before the later ones are changed."""
_WEIGHTS = 2**23
"""Most weights that are rounded together; five times their bytes in float32 are taken meanwhile."""


Layer = tuple[torch.Tensor, torch.Tensor]
"""Weight (O, I) and the step of each group (O, G) of a layer."""


@torch.no_grad()
def rounded(layers: Sequence[Layer], moments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the integers (O, I) of layers that get the same inputs, in -8..7: one factor serves all.

    Args:
        layers: that are rounded.
        moments: of their inputs, as `second_moments` returns them; computes where these are.
    """
    found = [torch.empty(weight.shape, dtype=torch.int8) for weight, _ in layers]
    begin = 0
    for part in moments:
        order = part.diagonal().argsort(descending=True, stable=True)
        factor = _factor(part, order)
        columns = order + begin
        for (weight, scale), integers in zip(layers, found, strict=True):
            groups = columns // (weight.shape[1] // scale.shape[1])
            for rows in torch.arange(len(weight)).split(max(1, _WEIGHTS // len(order))):
                left = weight[rows].to(part)[:, columns].T.contiguous()  # a column lies in one piece
                steps = scale[rows].to(part)[:, groups].T.contiguous()
                integers[rows[:, None], columns.cpu()] = _rounded(left, steps, factor).T.to("cpu", torch.int8)
        begin += len(order)
    return found


def _rounded(left: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return the integers (I, O) of a transposed weight, which is used up, with the step of each weight (I, O)."""
    per_step = torch.where(steps > 0, 1 / steps, 0.0)
    out = torch.empty_like(left)
    for start in range(0, len(left), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(left))
        errors = torch.empty_like(left[start:stop])
        for j, error in enumerate(errors, start):
            torch.mul(left[j], per_step[j], out=out[j]).round_().clamp_(-8, 7)
            torch.addcmul(left[j], out[j], steps[j], value=-1, out=error).div_(factor[j, j])
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return out


def _factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor (I, I) of the inverse of the moments in this order, damped until there is one.

    With P the reversal of rows and columns and L the lower factor of P H P, it is P inverse(L) P: H is not inverted.

    Raises:
        ValueError: a moment is not finite.
    """
    back, mean = order.flip(0), float(moments.diagonal().mean())
    if not math.isfinite(mean):
        raise ValueError("moments are not finite")
    damping = DAMPING * mean or 1.0  # without any input every rounding is as good
    while True:
        reverse = moments[back][:, back]
        reverse.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            break
        damping *= 10
    del reverse
    one = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    found: torch.Tensor = torch.linalg.solve_triangular(lower, one, upper=False, out=one)
    return found.flip(0, 1)


def moments_bytes(shapes: Iterable[Shape]) -> int:
    """Return about the bytes of the second moments of a block's inputs.

    Layers of the same shape mostly share an input, but each of two streams has its own.

    Args:
        shapes: of the block's tensors.
    """
    inputs = [shape[1] for shape in set(shapes) if len(shape) == 2]
    return 2 * sum(4 * size * size // -(-size // CHANNELS) for size in inputs)


def working_bytes(shapes: Iterable[Shape]) -> int:
    """Return the bytes that `rounded` takes beside weights and moments: parts of a weight, and three factors.

    Args:
        shapes: of the layers' weights.
    """
    found = [shape for shape in shapes if len(shape) == 2]
    parts = max(min(_WEIGHTS, rows * columns) for rows, columns in found)
    return 20 * parts + 3 * 4 * max(min(CHANNELS, columns) for _, columns in found) ** 2


@torch.no_grad()
def second_moments(layers: dict[str, nn.Linear], run: Callable[[], None], calls: int) -> dict[str, list[torch.Tensor]]:
    """Run `run` and return the second moments of each layer's inputs: E[x x'] of parts of up to CHANNELS inputs.

    Layers that get the same tensor share them: theirs is one list. Of a call with more rows than its part of ROWS, a
    seeded random choice stands for all.

    Args:
        layers: by name.
        run: runs the model on calibration inputs.
        calls: how often `run` calls each layer.

    Returns:
        For each layer that ran.

    Raises:
        InputError: an input is NaN or infinite.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, int] = {}
    owners: dict[str, str] = {}
    last: tuple[torch.Tensor | None, str] = None, ""
    draw = torch.Generator().manual_seed(0)

    def take(name: str, inputs: torch.Tensor) -> None:
        nonlocal last
        owner = owners.setdefault(name, last[1] if inputs is last[0] else name)
        last = inputs, owner
        if owner != name:
            return
        x = inputs.detach().flatten(0, -2)
        count = len(x)
        if count > (most := -(-ROWS // calls)):
            x = x[torch.randperm(count, generator=draw)[:most].to(x.device)]
        x = x.float()
        parts = x.tensor_split(-(-x.shape[1] // CHANNELS), dim=1)
        if name not in sums:
            sums[name], rows[name] = [x.new_zeros(part.shape[1], part.shape[1]) for part in parts], 0
        for total, part in zip(sums[name], parts, strict=True):
            total.addmm_(part.T, part, alpha=count / len(x))
        rows[name] += count

    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: take(n, args[0])) for n, m in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parts in sums.items():
        for part in parts:
            if not part.diagonal().isfinite().all():
                raise InputError(f"{name}: the model makes NaN or infinity of its inputs on the prompts that calibrate")
            part.div_(rows[name])
    return {name: sums[owner] for name, owner in owners.items()}
