"""The frozen prefix that teacher and student share runs once, and the results do not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import recipe, schedule, setup

from edgeprune.training import whole as training
from edgeprune.training.prefix import common_blocks
from edgeprune.training.recipe import DistillOptions


def train(path: Path, kind: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Return weights, losses, and how often each block of the student ran."""
    family, teacher, student, plan, report, pairs = setup(kind)
    runs = [0] * len(plan.kept)

    def ran(index: int) -> None:
        runs[index] += 1

    for index, block in enumerate(family.blocks(student)):
        block.register_forward_hook(lambda *_, index=index: ran(index))
    chosen = DistillOptions(steps=4, batch=4, rate=1e-3, **options)
    found = training.distill(
        family,
        teacher,
        student,
        plan,
        report,
        pairs,
        chosen,
        recipe(chosen),
        schedule(teacher),
        path,
        inputs_digest="x",
        guidance=3.5,
    )
    assert not any(block._forward_hooks for block in family.blocks(teacher))
    return *found, runs


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "z-image", "qwen-image"])
def test_losses_and_weights_are_those_without(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, losses, runs = train(tmp_path / "shared", kind, int4_group_size=None)
    assert runs == [0, 0, 4, 4]
    monkeypatch.setattr(training, "common_blocks", lambda *_: 0)
    own, expected, all_run = train(tmp_path / "own", kind, int4_group_size=None)
    assert all_run == [4, 4, 4, 4]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(torch.allclose(shared[n], own[n], atol=1e-6) for n in own)


def test_a_student_that_rounds_runs_its_own(tmp_path: Path) -> None:
    assert train(tmp_path / "rounded", "sd3")[2] == [4, 4, 4, 4]


def test_a_trained_prefix_is_run(tmp_path: Path) -> None:
    assert train(tmp_path / "s", "sd3", int4_group_size=None, freeze_prefix=False)[2] == [4, 4, 4, 4]


def test_a_prefix_of_other_weights_is_not_shared() -> None:
    family, teacher, student, plan, _, _ = setup()
    assert common_blocks(family, teacher, student, plan) == 2
    with torch.no_grad():
        teacher.transformer_blocks[1].attn.to_q.weight[0, 0] += 1e-3
    assert common_blocks(family, teacher, student, plan) == 0
