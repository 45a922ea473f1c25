"""The states that a tail is trained from: made by the original and, beside it, by the student's frozen blocks.

Lot by lot, pairs of a sample and a noise level pass through both, block by block: one block of each is in memory. The
student's blocks are rounded before, so what the tail is trained on comes from the integers that ship. A lot is a file
(training/states.py), so a run after a kill goes on with the next one.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.artefact.surgery import structure
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.files import digest, need_space
from edgeprune.common.progress import Progress, Steps
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.data.pairs import Pairs
from edgeprune.families import Shape
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import shorter_config
from edgeprune.quantization.int4 import dequantize
from edgeprune.residency.compute import is_small
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import at_once, model_inputs
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.stages.calibration import Side, Streams, stream_bytes, streams_of
from edgeprune.stages.costs import sample
from edgeprune.stages.rounder import Rounder, calibrated_in, int4_blocks
from edgeprune.stages.weights import PrunedWeights
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions, Recipe
from edgeprune.training.states import StateBatch, file_tensors
from edgeprune.training.whole import Noisy, noisy, without_prompt

PREFIX = "prefix_int4"
"""Folder in the cache: the frozen blocks in INT4, as the states have seen them. `quantize` takes them over."""
LOT, SMALL_LOT = 8, 256
"""States of a file, of a large model and of a small one. Both models are read once for each file; a kill costs one."""


def lot_of(numbers: int, count: int) -> int:
    """Return how many of `count` states a file holds.

    Args:
        numbers: weights of the original.
        count: states of a round.
    """
    return min(SMALL_LOT if is_small(numbers) else LOT, count)


def state_bytes(ws: Workspace, recipe: Recipe) -> int:
    """Return about how many bytes a state of the model's own image size takes on the disk."""
    latents, condition, *_ = sample(ws.family, ws.config, ws.source, ws.generation)
    streams = stream_bytes(ws.family, ws.config, tuple(latents.shape[1:]), condition.hidden.shape[1])
    sides = 2 if recipe.lambda_feature else 1
    computed = sides * streams + latents.nbytes  # the teacher's velocity, too
    return computed * ws.original.dtype.itemsize // 4 + latents.nbytes


class Rounded:
    """Reads rounded tensors with their numbers, under the names of the layers that they were rounded from.

    Args:
        weights: the rounded blocks, of which there may be only the first ones.
        shapes: of all tensors of the model.
    """

    def __init__(self, weights: Weights, shapes: Mapping[str, Shape]) -> None:
        self.weights, self.shapes = weights, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor; those that are packed in float32.

        Raises:
            InputError: it cannot be read.
        """
        packed, scale = f"{name}_packed", f"{name}_scale"
        if packed not in self.weights.shapes:
            return self.weights[name]
        bits = 8 * self.weights.shapes[packed][1] // self.shapes[name][1]
        return dequantize(self.weights[packed], self.weights[scale], bits, torch.float32)

    def dtype(self, name: str) -> torch.dtype:
        """Return that dtype."""
        return self.weights.dtype(name) if name in self.weights.shapes else torch.float32

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors in the background."""
        stored = (each for name in names for each in (name, f"{name}_packed", f"{name}_scale"))
        self.weights.ahead(name for name in stored if name in self.weights.shapes)

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Check nothing: the folder was written by this run or one before, and lacks the trained blocks."""


class Maker:
    """Makes the states of each round.

    Args:
        ws: the workspace.
        plan: what is pruned.
        pairs: what is trained on.
        schedule: the original's noise levels.
        options: of the training.
        recipe: what those options became that follow from the plan and the model.
        data: identity of `pairs`.
        progress: called after each file.
    """

    def __init__(
        self,
        ws: Workspace,
        plan: PrunePlan,
        pairs: Pairs,
        schedule: NoiseSchedule,
        options: DistillOptions,
        recipe: Recipe,
        data: Any,
        progress: Progress,
    ) -> None:
        self.ws, self.plan, self.pairs, self.schedule = ws, plan, pairs, schedule
        self.options, self.recipe, self.progress = options, recipe, progress
        self.pruned = ws.manifest.stages["prune"]["inputs"]
        self.count = recipe.states
        self.lot = lot_of(ws.subject.numbers, self.count)
        self.lots = -(-self.count // self.lot)
        drawn = [recipe.levels, recipe.drop_captions, options.seed, self.count, self.lot, recipe.lambda_feature > 0]
        if options.guidance is not None:
            drawn.append(options.guidance)
        rounding = [options.int4_group_size, recipe.prefix_calibration]
        self.key = digest([self.pruned, ws.weights_hash, data, ws.generation.to_json(), drawn, rounding])

    def make(self, number: int) -> list[Path]:
        """Return the files of a round, those that are missing made; those of other rounds are deleted.

        Raises:
            DiskError: the disk is full.
            InputError: a file is missing or damaged, or the original does not run in the memory that was given.
        """
        folder = self.ws.cache / f"states-{self.key[:12]}-{number}"
        for other in self.ws.cache.glob("states-*"):
            if other != folder:
                shutil.rmtree(other)
        files = [folder / f"{lot:05}.safetensors" for lot in range(self.lots)]
        blocks, todo = self.plan.num_blocks, [lot for lot, path in enumerate(files) if not path.is_file()]
        step = Steps(f"states of round {number + 1} of {self.recipe.rounds}", self.lots * blocks, self.progress)
        for _ in range((self.lots - len(todo)) * blocks):
            step()
        if not todo:
            return files
        need_space(folder, len(todo) * self.lot * state_bytes(self.ws, self.recipe))
        prefix = self._prefix()
        for lot in todo:
            batch = self._drawn(number * self.lots + lot, min(self.lot, self.count - lot * self.lot))
            save_tensors(files[lot], file_tensors(self._answered(batch, prefix, step)))
        return files

    def _drawn(self, number: int, size: int) -> Noisy:
        return noisy(self.pairs, replace(self.options, batch=size), self.recipe, self.schedule, number)

    def _streams(self, name: str, batch: Noisy) -> Callable[[StoredTransformer], Streams]:
        """Return what makes the streams of a batch before the first block of a transformer."""
        ws, shape = self.ws, tuple(batch.latents.shape[1:])
        size = len(batch.latents) * stream_bytes(ws.family, ws.config, shape, batch.condition.hidden.shape[1])

        def inputs(model: Any) -> Iterator[Tensors]:
            most = at_once(model, shape)
            for start in range(0, len(batch.latents), most):
                one = batch[slice(start, start + most)]
                yield model_inputs(model, one.latents, one.condition, one.sigma, ws.generation.guidance_scale)

        return lambda stored: streams_of(ws, stored.model, inputs(stored.model), size, name, share=6)

    def _prefix(self) -> StoredTransformer | None:
        """Return the student with its frozen blocks as they ship; None where they are the original's own."""
        ws, plan, size = self.ws, self.plan, self.options.int4_group_size

        def student() -> Any:
            return structure(ws.family, ws.config, plan)

        pruned = StoredTransformer(ws.family, student(), PrunedWeights(ws, plan, self.pruned))
        if size is None:
            return None if plan.modulation_rank is None else pruned
        blocks = int4_blocks(ws, plan, pruned.model, size)
        frozen = [*blocks[: plan.first_pruned], blocks[-1]]
        calibration, streams, dtype = self.recipe.prefix_calibration, None, calibrated_in(pruned, ws.original.dtype)
        if calibration != "none":
            pruned.fill(pruned.names(None), dtype)
            streams = self._streams("prefix", self._drawn(0, self.lot))(pruned)
        rounder = Rounder(pruned, frozen, size, calibration, streams, dtype)
        try:
            write_transformer(
                ws.cache, PREFIX, shorter_config(ws.family, ws.config, plan), frozen, rounder.make,
                inputs=self.prefix_key, found=rounder.found, progress=self.progress,
            )  # fmt: skip
        finally:
            if streams is not None:
                streams.close()
        model = student()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return StoredTransformer(ws.family, model, Rounded(Weights(ws.cache / PREFIX), shapes))

    @property
    def prefix_key(self) -> str:
        """Digest of what the rounded blocks depend on."""
        calibrated = self.recipe.prefix_calibration != "none"
        return digest([self.pruned, self.options.int4_group_size, self.key if calibrated else "none"])

    def _answered(self, batch: Noisy, prefix: StoredTransformer | None, step: Callable[[], None]) -> StateBatch:
        """Send a batch through both models; return its states. `step` is called after each block."""
        ws, first = self.ws, self.plan.first_pruned
        with ExitStack() as stack:

            def side(stored: StoredTransformer, name: str, batch: Noisy) -> Side:
                return stack.enter_context(Side(stored, ws.original.dtype, self._streams(name, batch)))

            count = len(batch.latents)
            asked = batch if self.options.guidance is None else batch + without_prompt(batch, self.pairs)
            whole = side(copy.deepcopy(ws.original.stored), "streams", asked)
            left = None if prefix is None else side(copy.deepcopy(prefix), "shorter", batch)
            taught = Tensors()
            for block in range(self.plan.num_blocks):
                if block == first and (left is None or self.recipe.lambda_feature):
                    taught = {name: tensor[:count] for name, tensor in _all(whole.streams).items()}
                whole.advance(block)
                if left is not None and block < first:
                    left.advance(block)
                step()
            found = taught if left is None else _all(left.streams)
            velocity = whole.streams.velocities(whole.stored.model, batch.latents.shape[1:])
            if self.options.guidance is not None:
                velocity = torch.lerp(velocity[count:].float(), velocity[:count].float(), self.options.guidance)
            return StateBatch(
                streams=found,
                velocity=velocity.to(ws.original.dtype),
                target=batch.velocity.float(),
                taught=taught if self.recipe.lambda_feature else {},
                positions=tuple(whole.streams.positions),
                grid=tuple(whole.streams.grid),
            )


def _all(streams: Streams) -> Tensors:
    """Return the streams of all samples."""
    parts = list(streams.all())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
