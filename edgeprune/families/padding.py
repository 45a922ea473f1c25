"""Tokens of Z-Image: packed with the channels last, and padded to a multiple of 32.

All but `ids` work on numpy arrays and torch tensors alike. Importing this module does not load torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeprune.families.architecture import Shape
from edgeprune.families.network import Array
from edgeprune.families.packing import PATCH

MULTIPLE = 32
"""Image and text are each padded to a multiple of this many tokens."""


def pack(latents: Array) -> Array:
    """Pack latents (B, C, h, w) into tokens (B, N, 4 C), channels last."""
    b, c, h, w = latents.shape
    # (B, C, i, p, j, q) to (B, i, j, p, q, C); numpy and torch share swapaxes, not permute.
    split = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    tokens = split.swapaxes(1, 2).swapaxes(2, 4).swapaxes(4, 5)
    return tokens.reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: Array, shape: Shape) -> Array:
    """Undo `pack`: tokens (B, N, 4 C) to latents of `shape` (B, C, h, w)."""
    b, c, h, w = shape
    split = tokens.reshape(b, h // PATCH, w // PATCH, PATCH, PATCH, c)
    return split.swapaxes(4, 5).swapaxes(2, 4).swapaxes(1, 2).reshape(b, c, h, w)


def whole(count: int) -> int:
    """Round a number of tokens up to a multiple of 32."""
    return -(-count // MULTIPLE) * MULTIPLE


def padded(tokens: Array, count: int) -> Array:
    """Return the first `count` of tokens (B, M, K), and the last of these as often as padding needs."""
    return tokens[:, np.arange(whole(count)).clip(max=count - 1)]


def ids(rows: int, columns: int) -> NDArray[np.float32]:
    """Return for each token of an image (N, 3): 1, row and column; zeros for padding."""
    ids = np.zeros((whole(rows * columns), 3), np.float32)
    places = np.stack(np.meshgrid(1, np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 3)
    ids[: len(places)] = places
    return ids
