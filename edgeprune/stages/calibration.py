"""Samples that go through a transformer block by block: all of them through one block before the next is read.

The inputs of a block are what the blocks before it, as they were written, make of the original's own trajectories. One
block is in memory at a time, and each is read once. Streams that do not fit in memory are on disk.

Notation: N image tokens, M text tokens, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from edgeprune.common.splits import Split
from edgeprune.common.tensors import save_tensors
from edgeprune.families import Family
from edgeprune.metrics.velocity import VelocityError
from edgeprune.residency.compute import Compute
from edgeprune.residency.stored import CPU
from edgeprune.sampling.denoising import network_inputs
from edgeprune.stages.modulation import is_guided
from edgeprune.stages.options import seen
from edgeprune.stages.workspace import Workspace

Batch = dict[str, torch.Tensor]
"""Streams of some samples before a block: `image` (B, N, D), `text` (B, M, D) and `modulation` (B, D)."""


class Streams:
    """The streams of all samples before the block that comes next.

    Args:
        family: the transformer's family.
        model: the transformer; its tensors outside the blocks have their numbers.
        inputs: of the model's forward, for batches of samples.
        room: bytes that the streams may take in memory.
        scratch: a folder for those that do not fit.
        device: where blocks run; the streams are with the processor.
    """

    def __init__(
        self, family: Family, model: Any, inputs: Iterator[Batch], room: int, scratch: Path, device: torch.device = CPU
    ) -> None:
        self.family, self.room, self.scratch, self.device = family, room, scratch, device
        self.batches: list[Batch | Path] = []
        self.positions: Sequence[torch.Tensor] = ()
        shutil.rmtree(scratch, ignore_errors=True)
        with torch.no_grad():
            for one in inputs:
                image, text, modulation = family.embed(model, one)
                if not self.batches:
                    self.positions = family.positions(model, one)  # depend on sizes alone
                self._put(len(self.batches), {"image": image, "text": text, "modulation": modulation})

    @torch.no_grad()
    def run(self, block: nn.Module, *, advance: bool = False) -> None:
        """Send all samples through a block.

        Args:
            block: with its weights.
            advance: keep the results: they are what the next block gets. Otherwise only hooks see the samples.
        """
        block.to(self.device)
        positions = [position.to(self.device) for position in self.positions]
        for index, batch in enumerate(self.batches):
            streams = load_file(batch) if isinstance(batch, Path) else batch
            image, text, modulation = (streams[name].to(self.device) for name in ("image", "text", "modulation"))
            image, ended = self.family.run(block, image, text, modulation, positions)
            if advance:
                # A block that ends the text stream is the last one.
                self._put(index, streams | {"image": image.cpu()} | ({} if ended is None else {"text": ended.cpu()}))
        block.to(CPU)

    def close(self) -> None:
        """Free memory and disk."""
        self.batches.clear()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _put(self, index: int, streams: Batch) -> None:
        size = sum(tensor.nbytes for tensor in streams.values())
        if index == len(self.batches):
            stays = size <= self.room
            self.room -= size if stays else 0
            self.batches.append(streams if stays else self.scratch / f"{index}.safetensors")
        found = self.batches[index]
        if isinstance(found, Path):
            found.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(found, streams)
        else:
            self.batches[index] = streams


def calibration_streams(ws: Workspace, model: Any, prompts: list[str], states: int | None = None) -> Streams:
    """Return the samples of the original's trajectories of these prompts, before the first block of `model`.

    With classifier-free guidance every state is evaluated with its prompt and with the empty one.

    Args:
        ws: the workspace.
        model: the pruned transformer; its tensors outside the blocks have their numbers.
        prompts: one trajectory each.
        states: most states of each; None for the usual number.
    """
    images = seen(ws.generation, states)
    metric = VelocityError(ws.pipe, images, prompts, split=Split.CALIBRATION, compares=False)

    def inputs() -> Iterator[Batch]:
        for start in range(0, len(metric.states), metric.batch):
            rows = slice(start, start + metric.batch)
            states, condition = metric.states[rows], metric.condition_of(rows)
            for text in (condition, metric.empty[[0] * len(states)]) if is_guided(ws) else (condition,):
                one = network_inputs(model, states, text, metric.sigmas[rows], metric.guidance)
                yield {name: value.cpu() for name, value in one.items()}

    ws.original.release_transformer()
    host = Compute(memory=ws.original.compute.memory if ws.original.compute.device.type == "cpu" else None)
    return Streams(ws.family, model, inputs(), host.left() // 3, ws.cache / "streams", ws.original.compute.device)
