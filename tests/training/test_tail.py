"""Training of the tail from states: the same losses as with both models in memory, of the last blocks alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import recipe, schedule, setup, streams_before
from safetensors.torch import save_file
from tiny import COSTLY_KINDS, KINDS, config_of, tiny_step

from edgeprune.artefact.surgery import prune
from edgeprune.common.errors import InputError
from edgeprune.common.tensors import save_tensors
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import HERE, DistillOptions, parameter_groups
from edgeprune.training.states import StateBatch, States, file_tensors
from edgeprune.training.tail import Tail, TailLesson, cut
from edgeprune.training.whole import Noisy, Whole, noisy


@pytest.mark.parametrize("kind", COSTLY_KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tail_goes_on_where_the_prefix_ends(kind: str, checkpointing: bool) -> None:
    model = KINDS[kind]()
    family, (latents, condition, sigma, guidance) = family_of(config_of(model)), tiny_step()
    with torch.no_grad():
        expected = velocity(model, latents, condition, sigma, guidance)
    for first in range(1, len(family.blocks(model))):
        states = StateBatch(
            velocity=latents, target=latents,
            **streams_before(family, model, first, Noisy(latents, condition, sigma, latents), guidance),
        )  # fmt: skip
        last = copy.deepcopy(model)
        cut(family, last, first)
        found = Tail(family, last, first, checkpointing=checkpointing)(states.streams, states)
        assert (found - expected).abs().max() <= 1e-5
        left = {name for name, _ in model.named_parameters() if name in dict(last.named_parameters())}
        blocks = tuple(family.block_prefix(model, index) for index in range(first, len(family.blocks(model))))
        assert left == {n for n, _ in model.named_parameters() if n.startswith((*blocks, *family.tail))}
        assert dict(last.named_parameters()).keys() == left


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=pytest.mark.slow if options and kind not in ("sd3", "flux2") else ())
        for options in ({}, {"lambda_feature": 1.0, "lambda_task": 0.5}, {"features": "attention"})
        for kind in ("sd3", "flux", "flux2", "z-image", "qwen-image")
    ],
)
def test_the_loss_is_that_with_both_models_in_memory(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    family, teacher, student, plan, report, pairs = setup(kind)
    for model in (teacher, student):
        model.double()  # the loss is a small difference of two large outputs
    chosen = DistillOptions(batch=4, int4_group_size=None, **options)
    how, levels, parallel = recipe(chosen), schedule(teacher), Parallel("no", 4, HERE, torch.device("cpu"))
    single = noisy(pairs, chosen, how, levels, 3)
    condition = Conditioning(single.condition.hidden.double(), single.condition.pooled.double())
    drawn = Noisy(single.latents.double(), condition, single.sigma.double(), single.velocity.double())
    with torch.no_grad():
        answer = velocity(teacher, drawn.latents, drawn.condition, drawn.sigma, 3.5)
    before = streams_before(family, teacher, plan.first_pruned, drawn, 3.5)
    states = StateBatch(velocity=answer, target=drawn.velocity, taught=before["streams"], **before)
    last, taught = copy.deepcopy(student), copy.deepcopy(teacher)

    whole = Whole(family, teacher, student, plan, pairs, chosen, how, levels, 3.5)
    parameter_groups(family, student, plan, report, how, 1e-3)
    whole.place(parallel)
    whole.begin(student, parallel)
    expected = whole.loss(drawn)
    expected.backward()

    for model in (last, taught):
        cut(family, model, plan.first_pruned)
    parameter_groups(family, last, plan, report, how, 1e-3)
    lesson = TailLesson(family, last, plan, None, chosen, how, taught)
    lesson.place(parallel)
    lesson.begin(lesson.module, parallel)
    found = lesson.loss(states)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in last.named_parameters() if p.grad is not None}
    for name, parameter in last.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max().clamp(min=1e-3)
    lesson.end()
    whole.end()
    assert not any(block._forward_hooks for block in family.blocks(last))


def some_states(count: int, side: int = 4) -> StateBatch:
    numbers = torch.arange(count).float()

    def of(*shape: int) -> torch.Tensor:
        return numbers.view(-1, *(1,) * len(shape)).expand(-1, *shape).contiguous()

    return StateBatch(
        {"image": of(side * side, 8), "text": of(3, 8), "modulation": of(8)}, of(2, side, side), of(2, side, side),
        positions=(torch.ones(5, 4),), grid=(side, side),
    )  # fmt: skip


def test_states_of_one_size_are_drawn_together(tmp_path: Path) -> None:
    for name, count, side in (("a", 3, 4), ("b", 5, 4), ("c", 8, 6)):
        save_tensors(tmp_path / f"{name}.safetensors", file_tensors(some_states(count, side)))
    states = States(sorted(tmp_path.glob("*")))
    assert len(states) == 16
    seen: dict[int, list[float]] = {4: [], 6: []}
    for step in range(300):
        batch = states.batch(3, torch.Generator().manual_seed(step))
        side = batch.grid[0]
        assert batch.velocity.shape == (3, 2, side, side) and batch.streams["image"].shape == (3, side * side, 8)
        drawn = batch.streams["modulation"][:, 0].tolist()
        assert batch.streams["text"][:, 0, 0].tolist() == drawn
        assert len(batch.positions) == 1 and not batch.taught
        seen[side] += drawn
        part = batch[slice(1, 3)].to(torch.device("cpu"))
        assert torch.equal(part.streams["image"], batch.streams["image"][1:]) and part.positions == batch.positions
    assert 0.4 < len(seen[4]) / 900 < 0.6  # eight of the sixteen
    assert {int(value) for value in seen[4]} == set(range(5)) and {int(value) for value in seen[6]} == set(range(8))
    # Values 0 to 2 are in both files.
    assert 0.6 < sum(value < 3 for value in seen[4]) / len(seen[4]) < 0.9
    again = states.batch(3, torch.Generator().manual_seed(7))
    assert torch.equal(again.velocity, states.batch(3, torch.Generator().manual_seed(7)).velocity)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="a.safetensors: not states of training .*; delete it to make it again"):
        States([path])
    save_file({"image": torch.ones(1, 2, 3)}, path)
    with pytest.raises(InputError, match="a.safetensors: grid: found no such tensor; delete the file"):
        States([path])
    with pytest.raises(InputError, match="states: found no files"):
        States([])


def test_stand_ins_are_trained_too() -> None:
    teacher = KINDS["sd3"]()
    config, family = config_of(teacher), family_of(config_of(teacher))
    plan = make_plan(family, config, None, method="manual", blocks="1-2", stand_in=4)
    maps = {
        f"transformer_blocks.1.stand_in.{stream}.{name}": torch.zeros(shape)
        for stream in ("image", "text")
        for name, shape in (("down.weight", (4, 64)), ("up.weight", (64, 4)), ("up.bias", (64,)))
    }
    student = prune(family, teacher, config, plan, None, stand_ins=maps)
    cut(family, student, plan.first_pruned)
    chosen = DistillOptions(states=1)
    groups = parameter_groups(family, student, plan, None, recipe(chosen), 1e-3)
    assert maps.keys() <= {name for name, p in student.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))
