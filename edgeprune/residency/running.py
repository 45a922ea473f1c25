"""Make a stored transformer ready to run: in memory if it is small, else read block by block within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from edgeprune.common.errors import InputError
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.streaming import largest_running_bytes

PROCESS_BYTES = 550_000_000
"""Of Python with torch, diffusers and transformers."""
_LEAST_WORKING_BYTES = 3 * 10**8
"""What has to be free beside the block that computes and what is outside the blocks: activations of one sample."""
_WORKING_BYTES = 7 * 10**8
"""What is left free of the memory beside that, before blocks are kept: states, more samples, the VAE."""
_HEAP = 1.3
"""Bytes of process memory per byte of blocks and activations: glibc keeps freed memory that it could reuse. Gates of
SD3.5 Large at 512x512, in as little as is accepted, took 0.92 of what this counts."""
_RUN_SHARE = 6
"""Activations of rows that run together take at most 1/6 of the memory that was given."""

_COMPUTE = "_edgeprune_compute"
"""Attribute of a transformer: where it computes, and how much memory that may take."""


def running(stored: StoredTransformer, compute: Compute, dtype: torch.dtype | None = None, *, keep: bool = True) -> Any:
    """Return a transformer that is ready to run: held in float32 if it is small, else read block by block.

    Blocks stay in memory, in the dtype of their file, as far as there is room.

    Args:
        stored: its structure and weights.
        compute: where it computes, and how much memory that may take.
        dtype: to compute in; None for the one that `compute` chooses.
        keep: keep blocks in memory as far as there is room.

    Raises:
        InputError: it does not run in so little memory; says how much it takes.
    """
    if is_small(stored.numbers) and compute.memory is None:
        return within(stored.load(dtype or torch.float32).to(compute.device), compute)
    left, least = check_room(stored, compute, dtype)
    together = max(0, (compute.memory or 0) // _RUN_SHARE - _LEAST_WORKING_BYTES)
    room = left - least - _WORKING_BYTES - together if keep else 0
    return within(stored.running(dtype or dtype_of(stored, compute), compute.device, keep=room), compute)


def within(model: Any, compute: Compute) -> Any:
    """Note on a transformer how much memory it may take, for `room_to_run`; return it."""
    setattr(model, _COMPUTE, compute)
    return model


def room_to_run(model: Any, wanted: int) -> int:
    """Return the bytes that the activations of the rows that run together may take, of `wanted` that suffice.

    Of a memory that was given they are a fixed share, whatever is free: products of other row counts differ in their
    last bits. Otherwise they are half of what is left beside the largest block that is read: the other half is for what
    waits between two blocks, see `spare`. Where so little is wanted that it has to be free anyway, or where nobody said
    where the transformer computes, nothing is counted.

    Args:
        model: the transformer; none of its blocks runs now.
        wanted: bytes.
    """
    compute: Compute | None = getattr(model, _COMPUTE, None)
    if compute is None or wanted <= _LEAST_WORKING_BYTES:
        return wanted
    if compute.memory is not None:
        return min(wanted, share_to_run(compute.memory, _outside_bytes(model), _block_bytes(model)))
    reading = _block_bytes(model)
    if (compute.left() - reading) // 2 < wanted:  # collecting takes a while
        compute.collect()
    return min(wanted, max(0, compute.left() - reading) // 2)


def share_to_run(memory: int, outside: int, block: int) -> int:
    """Return the bytes of a given memory for activations of rows that run together.

    They are also at most half of what the process and the weights leave of it.

    Args:
        memory: what was given.
        outside: bytes of the weights outside blocks.
        block: bytes of the largest block.
    """
    left = memory - PROCESS_BYTES - outside - block
    return max(_LEAST_WORKING_BYTES, min(memory // _RUN_SHARE, left // 2))


def dtype_of(stored: StoredTransformer, compute: Compute) -> torch.dtype:
    """Return the dtype that a transformer computes in."""
    return compute.dtype(_stored_dtype(stored), stored.numbers, fits_half=not stored.family.overflows)


def check_room(stored: StoredTransformer, compute: Compute, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Return the bytes that may still be taken, and those that the transformer takes at least while it runs.

    Args:
        stored: its structure and weights.
        compute: where it computes.
        dtype: to compute in; None for the one that `compute` chooses.

    Raises:
        InputError: memory was given, and it does not suffice; says how much does.
    """
    kind, dtype = _stored_dtype(stored), dtype or dtype_of(stored, compute)
    blocks = range(len(stored.family.blocks(stored.model)))
    sizes = [[math.prod(stored.weights.shapes[n]) for n in stored.names(block)] for block in blocks]
    largest = max(sizes, key=sum)
    outside = sum(math.prod(stored.weights.shapes[n]) for n in stored.names(None))
    least, left = least_bytes(largest, outside, kind.itemsize, dtype.itemsize), compute.left()
    if left < least + _WORKING_BYTES:  # collecting takes a while
        compute.collect()
        left = compute.left()
    if compute.memory is not None and left < least:
        needed = compute.taken() + least
        raise InputError(f"--memory: found {compute.memory / 1e9:.2f} GB, expected at least {needed / 1e9:.2f} GB here")
    return left, least


def least_bytes(largest: Sequence[int], outside: int, stored: int, computed: int, working: int = 0) -> int:
    """Return the bytes that a transformer takes at least while it runs: what is outside its blocks, and one block.

    Args:
        largest: weights of each tensor of its largest block.
        outside: weights outside the blocks.
        stored: bytes of a weight in the file.
        computed: bytes of a weight as it computes.
        working: of activations; a run asks for those of one small sample anyway.
    """
    widened = 0 if stored == computed else stored * max(largest)  # one tensor is there in both
    return outside * computed + int(_HEAP * (sum(largest) * computed + widened + max(_LEAST_WORKING_BYTES, working)))


def spare(model: Any, compute: Compute, wanted: int) -> int:
    """Return the bytes that samples may take between two blocks of a transformer whose blocks are read when they run.

    They are half of what is left beside the block that computes and the activations of what runs together: in glibc's
    heap the streams of 150 samples took 1.7 times their bytes, and other parts of a stage grow meanwhile.

    Args:
        model: the transformer; none of its blocks runs now.
        compute: where it computes, and how much memory that may take.
        wanted: bytes that suffice; if fewer are free, freed memory is collected first.
    """
    needed = _block_bytes(model) + _LEAST_WORKING_BYTES
    if compute.memory is not None:
        needed = _block_bytes(model) + share_to_run(compute.memory, _outside_bytes(model), _block_bytes(model))
    if (compute.left() - needed) // 2 < wanted:  # collecting takes a while
        compute.collect()
    return max(0, compute.left() - needed) // 2


def _block_bytes(model: Any) -> int:
    return int(_HEAP * largest_running_bytes(model))


def _outside_bytes(model: Any) -> int:
    return sum(int(t.nbytes) for t in (*model.parameters(), *model.buffers()) if not t.is_meta)


def _stored_dtype(stored: StoredTransformer) -> torch.dtype:
    return stored.weights.dtype(next(name for name in stored.weights.shapes if name.endswith(".weight")))
