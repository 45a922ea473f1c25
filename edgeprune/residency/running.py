"""Make a stored transformer ready to run: in memory if it is small, else read block by block within a budget."""

from __future__ import annotations

import math
from typing import Any

import torch

from edgeprune.common.errors import InputError
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.stored import StoredTransformer

_LEAST_WORKING_BYTES = 3 * 10**8
"""What has to be free beside the block that computes and what is outside the blocks: activations of one sample."""
_WORKING_BYTES = 7 * 10**8
"""What is left free of the memory beside that, before blocks are kept: states, more samples, the VAE."""


def running(stored: StoredTransformer, compute: Compute, dtype: torch.dtype | None = None) -> Any:
    """Return a transformer that is ready to run: held in float32 if it is small, else read block by block.

    Blocks stay in memory, in the dtype of their file, as far as there is room.

    Args:
        stored: its structure and weights.
        compute: where it computes, and how much memory that may take.
        dtype: to compute in; None for the one that `compute` chooses.

    Raises:
        InputError: it does not run in so little memory; says how much it takes.
    """
    names = [*stored.weights.shapes]
    numbers = sum(map(math.prod, stored.weights.shapes.values()))
    if is_small(numbers) and compute.memory is None:
        return stored.load(dtype or torch.float32).to(compute.device)
    kind = stored.weights.dtype(next(n for n in names if n.endswith(".weight")))
    dtype = dtype or compute.dtype(kind, numbers)
    blocks = range(len(stored.family.blocks(stored.model)))
    largest = max(sum(math.prod(stored.weights.shapes[n]) for n in stored.names(block)) for block in blocks)
    per_number = (torch.finfo(dtype).bits + torch.finfo(kind).bits) // 8
    outside = sum(math.prod(stored.weights.shapes[n]) for n in stored.names(None))
    least, left = (largest + outside) * per_number + _LEAST_WORKING_BYTES, compute.left()
    if compute.memory is not None and left < least:
        needed = compute.memory - left + least
        raise InputError(f"--memory: found {compute.memory / 1e9:.2f} GB, expected at least {needed / 1e9:.2f} GB here")
    return stored.running(dtype, compute.device, keep=left - least - _WORKING_BYTES)
