"""Decodes latents within a number of bytes, in strips of rows; the pixels are those of the whole decoder.

Each segment of strips.py becomes a model of its own, which shares the weights of the mapped file and is opened for one
height of strips when its turn comes. With OpenVINO, SD3.5's decoder at 1024x1024 then peaks at 0.26 instead of 3.76 GB,
takes 1.15 to 1.18 times the processor time, and differs by 8e-6 of the largest value. What passes between segments is
on the disk, 2.1 GB of it; strip_store.py says where. Knows nothing of a format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.heap import trim
from edgeprune.common.memory import resident
from edgeprune.common.pieces import Needs
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.strip_runner import Opened, least_bytes, run
from edgeprune.runtimes.strips import Plan

INPUT, OUTPUT = "latent_sample", "sample"
"""As the export names them (export/modules.py)."""
STARTED = 110_000_000
"""Bytes of a process that has read a decoder and computed nothing; 97 MB were measured with OpenVINO, 99 with ONNX
Runtime."""
SLACK = 80_000_000
"""Bytes for what cannot be counted, code that the runtime loads to compile and its scratch memory; 68 MB were measured
with OpenVINO."""


class Strips(Protocol):
    """A decoder at one size of latents, cut into segments."""

    plan: Plan

    def opened(self, index: int, rows: int) -> Opened:
        """Open the segment of this place for strips of so many rows."""
        ...


class DecoderFile(Protocol):
    """A file that holds a decoder. Its weights are mapped."""

    path: Path
    device: str
    """Where it computes, in the runtime's own term."""
    why: str
    """Why it computes there."""

    def strips(self, shape: Sequence[int]) -> Strips:
        """Return the decoder for latents of this shape (1, C, h, w).

        Raises:
            InputError: the network is none that strips can compute.
        """
        ...

    def close(self) -> None:
        """Remove what was written for it."""
        ...


def least(file: DecoderFile, shape: Sequence[int]) -> int:
    """Return the fewest bytes, interpreter included, of a process that decodes latents of this shape in strips.

    Raises:
        InputError: the network is none that strips can compute.
    """
    return STARTED + SLACK + values(file, shape)


def values(file: DecoderFile, shape: Sequence[int]) -> int:
    """Return the fewest bytes that latents of this shape (1, C, h, w) take in strips, beyond an idle process.

    Raises:
        InputError: the network is none that strips can compute.
    """
    return least_bytes(file.strips(shape).plan)


def in_strips(file: DecoderFile, shapes: Mapping[str, Sequence[int]], needs: Needs) -> Needs:
    """Return what a network with inputs of these shapes takes, if a decoder is computed in strips; `needs` if not."""
    if INPUT not in shapes:
        return needs
    try:
        return Needs(needs.whole, values(file, shapes[INPUT]))
    except InputError:  # no strips can compute it
        return Needs(needs.whole, needs.whole)


class StripDecoder:
    """The `Network` of a VAE's decoder that keeps to a number of bytes.

    Args:
        file: its file.
        limit: most bytes of the process, interpreter included. What the process already has at a call counts; if that
            leaves less than the smallest strips need, they are taken nevertheless.
    """

    def __init__(self, file: DecoderFile, limit: int) -> None:
        self._file: DecoderFile | None = file
        self._limit = limit
        self.provider, self.why = file.device, file.why

    def largest_batch(self, name: str) -> None:
        """Return None: images are decoded one after the other."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return `sample` (B, 3, H, W), float32, of `latent_sample` (B, C, h, w).

        Raises:
            InputError: the limit is below `least`, the latents do not fit, or the runtime reports an error.
            DiskError: the disk has no room for what passes between segments.
        """
        if self._file is None:
            raise InputError("the runtime is closed; load the folder again")
        file = self._file
        if INPUT not in arrays:
            raise InputError(f"{file.path}: inputs: found {sorted(arrays)}, expected {INPUT}")
        latents = np.ascontiguousarray(arrays[INPUT], np.float32)
        height, width = latents.shape[2:]
        trim()
        before = max(STARTED, resident())
        graph = file.strips((1, *latents.shape[1:]))
        needed = STARTED + SLACK + least_bytes(graph.plan)
        if self._limit < needed:
            raise InputError(
                f"memory: found {self._limit} bytes, expected at least {needed} to decode latents of {height}x{width}"
            )
        images = np.empty((len(latents), *graph.plan.network.shapes[graph.plan.network.result][1:]), np.float32)
        budget = self._limit - before - SLACK - images[1:].nbytes
        for row, image in zip(latents, images, strict=True):
            run(graph.plan, row[None], image[None], budget, graph.opened)
        return {OUTPUT: images}

    def close(self) -> None:
        """Refuse further calls: nothing stays open between two."""
        if self._file is not None:
            self._file.close()
        self._file = None
