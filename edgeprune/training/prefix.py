"""The frozen blocks before the first pruned one, run once for teacher and student: they are the same weights (PWP).

The teacher's pass gives what goes into the first block that differs; the student's pass begins there, with what stands
in the place of removed blocks in analysis (estimators/reuse.py). What it leaves out: a student that rounds its weights,
whose prefix is not the teacher's, see `DistillOptions.int4_group_size`.
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
    """How many leading blocks are the same in both, by value, with all that feeds them: those before the first pruned.

    0 if a weight differs, projected modulation or training that has begun, and for a teacher of another precision.
    """
    if next(teacher.parameters()).dtype != next(student.parameters()).dtype:
        return 0  # it would compute otherwise, also with weights that are equal
    count, theirs = plan.first_pruned, teacher.state_dict()
    for name, tensor in student.state_dict().items():
        place = family.place(student.config, name)
        feeds = not name.startswith(family.tail) if place is None else place[0] < count
        if feeds and not (name in theirs and _same(tensor, theirs[name])):
            return 0
    return min(count, len(plan.kept))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


class SharedPrefix:
    """Of a teacher and a student whose first `count` blocks are the same."""

    def __init__(self, family: Family, teacher: nn.Module, student: Any, count: int) -> None:
        self.replay, self.dtype = Replay([]), student.dtype
        no_mean = torch.empty(0)  # which whole blocks do not ask for
        self.swaps = [family.removal(student, block, None, no_mean)[0] for block in range(count)]
        last = self.swaps[-1]
        self.swaps[-1] = type(last)(last.owner, last.attribute, self.replay)
        self.hook = family.blocks(teacher)[count - 1].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, out: Any) -> None:
        streams = out if isinstance(out, tuple) else (out,)
        streams = tuple(s if s is None else s.to(self.dtype) for s in streams)  # a teacher in bf16 gives bf16
        self.replay.kept = [streams if isinstance(out, tuple) else streams[0]]

    @contextmanager
    def student_begins_after(self) -> Iterator[None]:
        """The student's pass is the teacher's last one up to the first pruned block, then its own."""
        with swapped(self.swaps):
            yield

    def end(self) -> None:
        """Leave the teacher as it was."""
        self.hook.remove()
        self.replay.kept = []
