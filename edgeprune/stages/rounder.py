"""Rounding of a pruned transformer's weights to INT4, block by block."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from edgeprune.common import heap
from edgeprune.common.tensors import Tensors
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.quantize import prepare, quantize_part
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.stages.calibration import Streams
from edgeprune.stages.weights import by_block
from edgeprune.stages.workspace import Workspace


def int4_blocks(ws: Workspace, plan: PrunePlan, model: nn.Module, group_size: int) -> list[dict[str, int]]:
    """Return the bytes of the quantized tensors of `model`, the pruned structure, as `by_block` does."""
    empty = prepare(ws.family, copy.deepcopy(model), group_size=group_size).state_dict()
    sizes = {n: t.numel() * (t.element_size() if n.endswith(PACKED) else 2) for n, t in empty.items()}
    return by_block(ws, sizes, plan)


def taken(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Return tensors of a model as they are stored: what is not packed in half precision."""
    state = model.state_dict()
    return {name: state[name] if name.endswith(PACKED) else state[name].half() for name in names}


def calibrated_in(stored: StoredTransformer, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which samples pass through blocks that are rounded.

    It is `dtype`, which the original computes in, if the weights are stored in it: then the blocks that run have all
    that is to be rounded. Else float32.
    """
    kinds = {stored.weights.dtype(name) for name in stored.weights.shapes if not name.endswith(PACKED)}
    return dtype if kinds == {dtype} else torch.float32


class Rounder:
    """Rounds a pruned transformer block by block, of which one is in memory, and sends calibration samples on.

    Args:
        stored: the transformer, on the meta device.
        blocks: the tensors of each entry of `by_block`; the last are outside the blocks.
        group_size: weights that share a scale.
        calibration: how integers are chosen.
        streams: of the samples that calibrate; None without.
        dtype: of the streams, see `calibrated_in`.
        ready: blocks that are rounded already, the first ones; they are taken as they are.
    """

    def __init__(
        self,
        stored: StoredTransformer,
        blocks: Sequence[Mapping[str, int]],
        group_size: int,
        calibration: str,
        streams: Streams | None,
        dtype: torch.dtype = torch.float32,
        ready: Weights | None = None,
    ) -> None:
        self.stored, self.family, self.blocks = stored, stored.family, blocks
        self.group_size, self.calibration, self.ready = group_size, calibration, ready
        self.streams, self.dtype = streams, dtype

    def make(self, index: int) -> Tensors:
        """Round an entry, and return its tensors as they are stored."""
        in_block = index + 1 < len(self.blocks)
        if in_block and self.ready is not None and self.blocks[index].keys() <= self.ready.shapes.keys():
            self.found(index, self.ready)
            return {name: self.ready[name] for name in self.blocks[index]}
        stored, streams, block = self.stored, self.streams, index if index + 1 < len(self.blocks) else None
        run, calls = None, 1
        stored.fill(stored.names(block), self.dtype if streams else None)
        if streams is not None and block is not None:
            run, calls = partial(streams.run, self.family.blocks(stored.model)[block]), streams.batches
        quantize_part(
            self.family, stored.model, block, group_size=self.group_size, calibration=self.calibration, run=run,
            calls=calls,
        )  # fmt: skip
        tensors = taken(stored.model, self.blocks[index])
        if block is not None:
            self._advance(block, tensors)
        return tensors

    def found(self, index: int, weights: Weights) -> None:
        """Take over an entry that was rounded before."""
        if self.streams is not None and index + 1 < len(self.blocks):
            stored = self.stored
            prefix = self.family.block_prefix(stored.model, index)
            prepare(self.family, self.family.blocks(stored.model)[index], prefix=prefix, group_size=self.group_size)
            self._advance(index, {n: weights[n] for n in self.blocks[index]})

    def _advance(self, block: int, tensors: Tensors) -> None:
        """Calibrate later blocks with this one as it is on disk, so that an interrupted run ends in the same bytes."""
        if self.streams is not None:
            floats = {n: t if n.endswith(PACKED) else t.to(self.dtype) for n, t in tensors.items()}
            self.stored.model.load_state_dict(floats, strict=False, assign=True)
            self.streams.run(self.family.blocks(self.stored.model)[block], advance=True)
        self.stored.drop(block)
        if self.streams is not None:
            heap.trim()  # what glibc keeps of each block would add up to a tenth of the peak
