"""Training of the tail: the blocks from the first pruned one on, taught from states on disk.

PWP freezes everything before the first pruned block, so what comes out of there need not be computed in every step. A
state holds it, with the teacher's velocity (states.py). Teacher, prefix, text encoders and VAE are not in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.training.features import Catcher
from edgeprune.training.losses import Features, Streams, distillation_loss
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import DistillOptions, Recipe
from edgeprune.training.resume import step_generator
from edgeprune.training.rounding import Rounding
from edgeprune.training.states import STREAMS, StateBatch, States

JOINED = ("joined",)
"""The streams of a kind of blocks that have one, as a family names them."""


def cut(family: Family, model: nn.Module, first: int) -> None:
    """Take out of a model, in place, what runs before block `first`. All else keeps its name."""
    for index in range(first):
        owner, _, attribute = family.block_prefix(model, index)[:-1].rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Identity())
    lists = {family.block_prefix(model, index).partition(".")[0] for index in range(len(family.blocks(model)))}
    for name, _ in list(model.named_children()):
        if name not in lists and not f"{name}.".startswith(family.tail):
            setattr(model, name, nn.Identity())
    for name, _ in list(model.named_parameters(recurse=False)):
        setattr(model, name, None)


class Tail(nn.Module):
    """The blocks of a model from `first` on, and its output.

    Args:
        family: the model's.
        model: with weights in these blocks and after them.
        first: index of the first block that runs.
        checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(self, family: Family, model: Any, first: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.family, self.model, self.first, self.checkpointing = family, model, first, checkpointing

    def forward(self, streams: Mapping[str, torch.Tensor], batch: StateBatch) -> torch.Tensor:
        """Return the velocity (B, C, h, w).

        Args:
            streams: `image` (B, N, D), `text` (B, M, D) and `modulation` (B, D) before the first block.
            batch: the states that they belong to.
        """
        like = next(self.model.parameters())
        image, text, modulation = (streams[name].to(like) for name in STREAMS)
        positions = [position.to(like.device) for position in batch.positions]
        for block in self.family.blocks(self.model)[self.first :]:
            if self.checkpointing and torch.is_grad_enabled():
                image, ended = checkpoint(
                    self.family.run, block, image, text, modulation, positions, use_reentrant=False
                )
            else:
                image, ended = self.family.run(block, image, text, modulation, positions)
            text = text if ended is None else ended
        output = self.family.unembed(self.model, image, modulation, batch.grid)
        return self.family.velocity(self.model.config, output, batch.velocity.shape)  # type: ignore[no-any-return]


class TailLesson:
    """A student's tail, the states that it learns from, and where features are compared the teacher's later blocks.

    Args:
        family: the models'.
        student: the pruned model, after `cut`.
        plan: what was pruned.
        states: of this round; None where no step is left.
        options: of the training.
        recipe: what those options became that follow from the plan and the model.
        teacher: the original, after `cut`; None compares no features.
    """

    def __init__(
        self,
        family: Family,
        student: Any,
        plan: PrunePlan,
        states: States | None,
        options: DistillOptions,
        recipe: Recipe,
        teacher: Any = None,
    ) -> None:
        first = plan.first_pruned
        self.family, self.student, self.teacher, self.plan = family, student, teacher, plan
        self.states, self.options, self.recipe = states, options, recipe
        self.module = Tail(family, student, first, checkpointing=options.gradient_checkpointing)
        self.taught = None if teacher is None else Tail(family, teacher, first)
        kinds = family.kinds(student.config if teacher is None else teacher.config)
        self.single = {block for kind, blocks in kinds.items() if family.streams[kind] == JOINED for block in blocks}
        size = options.int4_group_size
        self.rounding = None if size is None else Rounding(family, student, size)

    def place(self, parallel: Parallel) -> None:
        """Shard the teacher's later blocks, or move them to the device."""
        if self.taught is not None:
            parallel.teach(self.taught)

    def begin(self, net: Any, parallel: Parallel) -> None:
        """Install the hooks and start computing with rounded weights."""
        self.net, self.parallel, self.catchers = net, parallel, list[Catcher]()
        if self.teacher is not None:
            for model, kept in ((self.teacher, list(range(self.plan.num_blocks))), (self.student, self.plan.kept)):
                self.catchers.append(Catcher(self.family, model, kept, self.recipe.features))
        self.student.train()
        if self.rounding:
            self.rounding.begin()

    def batch(self, step: int) -> StateBatch:
        """Draw the global batch of a step."""
        assert self.states is not None
        return self.states.batch(self.options.batch, step_generator(self.options.seed, step))

    def loss(self, batch: StateBatch) -> torch.Tensor:
        """Return the distillation loss of some states."""
        if self.taught is not None:
            with torch.no_grad(), self.parallel.autocast():
                self.taught(batch.taught, batch)
        with self.parallel.autocast():
            predicted = self.net(batch.streams, batch)
        taught, learning = (self._joined(catcher.features) for catcher in self.catchers) if self.catchers else ({}, {})
        return distillation_loss(predicted, batch.velocity, batch.target, learning, taught, self.recipe.weights)[0]

    def _joined(self, features: Features) -> Features:
        """Return features as a model's own forward gives them: `run` parts the streams of blocks that have one."""

        def whole(block: int, streams: Streams) -> Streams:
            if block not in self.single or "context" not in streams:
                return streams
            return {"image": torch.cat([streams["context"], streams["image"]], dim=1)}

        return {block: whole(block, streams) for block, streams in features.items()}

    def end(self) -> None:
        """Remove the hooks and restore the student."""
        for catcher in self.catchers:
            catcher.close()
        if self.taught is not None:
            self.parallel.release(self.taught)
        if self.rounding:
            self.rounding.end()
