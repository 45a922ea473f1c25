"""How many samples run together, from bytes. Torch-free.

Where blocks are read when they run, many samples pass through each before the next is read: it is read once for all of
them, not once for each. Results do not depend on it: a batch computes the same numbers whatever passes beside it.
Within a block, as many rows run in one call as there is room for their activations; that changes results by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeprune.families import Architecture, Config

_VECTORS = 16
"""Widths of the modulation input at most: FLUX.2 has that of all blocks at once, the others one."""
_LATENTS = 6
"""Float32 copies of a sample's latents: the state, what the solver remembers, the velocity and the next state."""

_ACTIVATIONS = 16
"""Widths per token that are alive at once in a block, streams included. Measured in float32 on a processor, whose
attention is fused, were up to 11 in a block of SD3.5 and 14 in a single-stream block of FLUX.1."""


def row_bytes(family: Architecture, config: Config, shape: Sequence[int], text: int, itemsize: int) -> int:
    """Return the bytes of activations that one row takes in a block; arguments as of `sample_bytes`."""
    image = shape[-1] * shape[-2] // family.latents(config).patch ** 2
    return itemsize * _ACTIVATIONS * (image + text) * family.width(config)


def rows_together(room: int, one: int, most: int) -> int:
    """Return how many of `most` rows run in one call: those whose `one` bytes each fit, at least one."""
    return max(1, min(most, room // one))


def sample_bytes(family: Architecture, config: Config, shape: Sequence[int], text: int, itemsize: int) -> int:
    """Return the bytes that one sample takes between two blocks: its streams, its modulation input and its latents.

    Args:
        family: the transformer's.
        config: the transformer's.
        shape: of the sample's latents (C, h, w).
        text: number of text tokens.
        itemsize: bytes of a number in the dtype that the transformer computes in.
    """
    image = shape[-1] * shape[-2] // family.latents(config).patch ** 2
    return itemsize * (image + text + _VECTORS) * family.width(config) + 4 * _LATENTS * math.prod(shape)


def batches_together(room: int, batch_bytes: int, count: int) -> int:
    """Return how many of `count` batches pass through each block together: those that fit, at least one.

    Args:
        room: bytes that they may take.
        batch_bytes: that the samples of one batch take between two blocks.
        count: batches that are still to run.
    """
    return max(1, min(count, room // batch_bytes))
