"""Samples that go through a transformer block by block: all of them through one block before the next is read.

The inputs of a block are what the blocks before it, as they were written, make of the original's own trajectories. One
block is in memory at a time, and each is read once. Streams that do not fit in memory are on disk.

Notation: N image tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.common.files import need_space
from edgeprune.common.splits import Split
from edgeprune.common.tensors import Tensors
from edgeprune.families import Config, Family
from edgeprune.metrics.velocity import VelocityError
from edgeprune.quantization.quantize import feedback_bytes
from edgeprune.residency.compute import Compute
from edgeprune.residency.running import share_to_run
from edgeprune.residency.spill import Spill
from edgeprune.residency.stored import CPU, StoredTransformer
from edgeprune.sampling.denoising import model_inputs
from edgeprune.sampling.together import row_bytes, rows_together
from edgeprune.stages.options import seen
from edgeprune.stages.workspace import Workspace


class Streams:
    """The streams of all samples before the block that comes next.

    Args:
        family: the transformer's family.
        model: the transformer; its tensors outside the blocks have their numbers.
        inputs: of the model's forward, for batches of samples.
        spill: keeps the streams.
        device: where blocks run.
    """

    def __init__(
        self, family: Family, model: Any, inputs: Iterator[Tensors], spill: Spill, device: torch.device = CPU
    ) -> None:
        self.family, self.spill, self.device, self.batches = family, spill, device, 0
        self.positions: Sequence[torch.Tensor] = ()
        self.grid: tuple[Any, ...] = ()
        with torch.no_grad():
            for one in inputs:
                image, text, modulation = family.embed(model, one)
                if not self.batches:  # they depend on sizes alone
                    self.positions, self.grid = family.positions(model, one), family.grid(model, one)
                spill.put(str(self.batches), {"image": image, "text": text, "modulation": modulation})
                self.batches += 1

    @torch.no_grad()
    def run(self, block: nn.Module, *, advance: bool = False) -> None:
        """Send all samples through a block.

        Args:
            block: with its weights.
            advance: keep the results: they are what the next block gets. Otherwise only hooks see the samples.
        """
        block.to(self.device)
        positions = [position.to(self.device) for position in self.positions]
        for key in map(str, range(self.batches)):
            streams = self.spill.get(key, self.device)
            image, text = streams["image"], streams["text"]
            image, ended = self.family.run(block, image, text, streams["modulation"], positions)
            if advance:
                # A block that ends the text stream is the last one.
                self.spill.put(key, streams | {"image": image} | ({} if ended is None else {"text": ended}))
        block.to(CPU)

    def all(self) -> Iterator[Tensors]:
        """Yield the streams of each batch, on the processor."""
        for key in map(str, range(self.batches)):
            yield self.spill.get(key)

    def change(self, change: Callable[[Tensors], Tensors]) -> None:
        """Replace the streams of each batch."""
        for key in map(str, range(self.batches)):
            self.spill.put(key, change(self.spill.get(key)))

    @torch.no_grad()
    def velocities(self, model: Any, shape: Sequence[int]) -> torch.Tensor:
        """Return the velocities of all samples (S, C, h, w) after the last block.

        Args:
            model: its tensors outside the blocks have their numbers, on the processor.
            shape: of one sample's latents (C, h, w).
        """
        found = []
        for one in self.all():
            output = self.family.unembed(model, one["image"], one["modulation"], self.grid)
            found.append(self.family.velocity(model.config, output, (len(one["image"]), *shape)))
        return torch.cat(found)

    def close(self) -> None:
        """Free memory and disk."""
        self.spill.clear()


class Side:
    """Samples on their way through one of several transformers, of which one block each is in memory.

    Args:
        stored: the transformer; what is outside its blocks is read at once.
        dtype: to compute in.
        streams: makes the samples' streams before its first block.
    """

    def __init__(
        self, stored: StoredTransformer, dtype: torch.dtype, streams: Callable[[StoredTransformer], Streams]
    ) -> None:
        self.stored, self.dtype = stored, dtype
        stored.fill(stored.names(None), dtype)
        self.streams = streams(stored)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.streams.close()

    def advance(self, index: int) -> None:
        """Send all samples through a block. The system reads the next one meanwhile."""
        blocks = self.stored.family.blocks(self.stored.model)
        self.stored.fill(self.stored.names(index), self.dtype)
        if index + 1 < len(blocks):
            self.stored.weights.ahead(self.stored.names(index + 1))
        self.streams.run(blocks[index], advance=True)
        self.stored.drop(index)


def calibration_states(
    ws: Workspace, prompts: list[str], states: int | None = None, *, spill: Spill | None = None
) -> VelocityError:
    """Return the states of the original's own trajectories of these prompts. It is not in memory afterwards.

    Args:
        ws: the workspace.
        prompts: one trajectory each.
        states: most states of each; None for the usual number.
        spill: keeps the trajectories, so that a run after a kill does not compute them again.
    """
    images = seen(ws.generation, states)
    metric = VelocityError(ws.pipe, images, prompts, split=Split.CALIBRATION, compares=False, spill=spill)
    ws.original.release_transformer()
    return metric


def streams_before(ws: Workspace, states: VelocityError, model: Any, name: str = "streams", share: int = 3) -> Streams:
    """Return the samples of some states before the first block of a model.

    With guidance by a second evaluation every state is evaluated with its prompt and with the empty one.

    Args:
        ws: the workspace.
        states: as `calibration_states` returns them.
        model: the transformer; its tensors outside the blocks have their numbers, on the processor, in the dtype to
            compute in.
        name: of the folder for what does not fit in memory.
        share: the samples take this part of the memory that is left, such as a third.
    """

    guided = ws.family.guided(ws.config, ws.student_generation.guidance_scale)

    shape, text = tuple(states.states.shape[1:]), states.condition.hidden.shape[1]
    batch = _rows_together(ws, model, shape, text, states.batch)

    def inputs() -> Iterator[Tensors]:
        for start in range(0, len(states.states), batch):
            rows = slice(start, start + batch)
            latents, condition = states.states[rows], states.condition_of(rows)
            for text in (condition, states.empty.like(condition)) if guided else (condition,):
                yield model_inputs(model, latents, text, states.sigmas[rows], states.guidance)

    samples = len(states.states) * (2 if guided else 1)
    return streams_of(ws, model, inputs(), samples * stream_bytes(ws.family, ws.config, shape, text), name, share)


def streams_of(
    ws: Workspace, model: Any, inputs: Iterator[Tensors], size: int, name: str = "streams", share: int = 3
) -> Streams:
    """Return samples before the first block of a model.

    Args:
        ws: the workspace.
        model: the transformer; its tensors outside the blocks have their numbers, on the processor, in the dtype to
            compute in.
        inputs: of its forward, for batches of samples.
        size: bytes that all streams take at most.
        name: of the folder for what does not fit in memory.
        share: the samples take this part of the memory that is left beside a block, such as a third.
    """
    host = Compute(memory=ws.original.compute.memory if ws.original.compute.device.type == "cpu" else None)
    host.collect()
    room, scratch = max(0, host.left() - block_bytes(ws.family, model)) // share, ws.cache / name
    need_space(scratch, max(0, size - room))
    return Streams(ws.family, model, inputs, Spill(scratch, room=room), ws.original.compute.device)


def _rows_together(ws: Workspace, model: Any, shape: tuple[int, ...], text: int, most: int) -> int:
    """Return how many of `most` samples run together in a block: those that the memory that was given has room for."""
    place, like = ws.original.compute, _like(model)
    if place.memory is None:
        return most
    outside = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    room = share_to_run(place.memory, outside, block_bytes(ws.family, model))
    return rows_together(room, row_bytes(ws.family, ws.config, shape, text, like.dtype.itemsize), most)


def _like(model: Any) -> torch.Tensor:
    """Return a tensor outside the blocks of a transformer."""
    like: torch.Tensor = next(t for t in model.parameters() if not t.is_meta)
    return like


def block_bytes(family: Family, model: Any) -> int:
    """Return the bytes of the block that takes most while it runs or is rounded, with the moments of its inputs.

    Args:
        family: the transformer's family.
        model: its tensors outside the blocks are in the dtype to compute in.
    """
    itemsize = _like(model).dtype.itemsize
    blocks = [[tuple(tensor.shape) for tensor in block.state_dict().values()] for block in family.blocks(model)]
    return max(feedback_bytes(shapes, itemsize, itemsize) for shapes in blocks)


def stream_bytes(family: Family, config: Config, shape: tuple[int, ...], text: int) -> int:
    """Return the bytes of one sample's streams: image and text tokens and the modulation input, in float32.

    Args:
        family: the transformer's.
        config: the transformer's.
        shape: of the sample's latents (C, h, w).
        text: number of text tokens.
    """
    image = shape[-1] * shape[-2] // family.latents(config).patch ** 2
    return 4 * (image + text + 1) * family.width(config)
