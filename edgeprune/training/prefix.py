"""Runs the frozen blocks before the first pruned one (PWP) once for teacher and student, since their weights are equal.

The student's pass starts from the teacher's output of the last common block. The skipped blocks are replaced as in
analysis (estimators/reuse.py). A student with rounded weights cannot share the prefix, since its weights differ from
the teacher's; see `DistillOptions.int4_group_size`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune.analysis.contribution import swapped
from edgeprune.analysis.estimators.reuse import Replay
from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan


def common_blocks(family: Family, teacher: nn.Module, student: Any, plan: PrunePlan) -> int:
    """Return the number of leading blocks, before the first pruned one, that both models can share.

    This is 0 if a weight of these blocks or of the embedders before them differs by value, because modulation was
    projected or training has begun; or if the teacher has another precision.
    """
    if next(teacher.parameters()).dtype != next(student.parameters()).dtype:
        return 0  # the results would differ even if the weights were equal
    count, teacher_state = plan.first_pruned, teacher.state_dict()
    for name, tensor in student.state_dict().items():
        place = family.place(student.config, name)
        feeds = not name.startswith(family.tail) if place is None else place[0] < count
        if feeds and not (name in teacher_state and _same(tensor, teacher_state[name])):
            return 0
    return min(count, len(plan.kept))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


class SharedPrefix:
    """The first `count` blocks, common to a teacher and its student."""

    def __init__(self, family: Family, teacher: nn.Module, student: Any, count: int) -> None:
        self.replay, self.dtype = Replay([]), student.dtype
        no_mean = torch.empty(0)  # removing whole blocks does not use the mean
        self.swaps = [family.removal(student, block, None, no_mean)[0] for block in range(count)]
        last = self.swaps[-1]
        self.swaps[-1] = type(last)(last.owner, last.attribute, self.replay)
        self.hook = family.blocks(teacher)[count - 1].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, out: Any) -> None:
        streams = out if isinstance(out, tuple) else (out,)
        streams = tuple(s if s is None else s.to(self.dtype) for s in streams)  # a teacher in bf16 outputs bf16
        self.replay.kept = [streams if isinstance(out, tuple) else streams[0]]

    @contextmanager
    def student_begins_after(self) -> Iterator[None]:
        """Inside the context, the student's pass starts from the teacher's last output of the common blocks."""
        with swapped(self.swaps):
            yield

    def end(self) -> None:
        """Remove the hook from the teacher and free the stored output."""
        self.hook.remove()
        self.replay.kept = []
