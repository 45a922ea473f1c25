"""Training of low-rank additions: what is trained, what is rounded, and what they end in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import recipe, schedule, setup
from tiny import config_of, tiny_step
from torch import nn

from edgeprune.common import extras
from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import precision_of
from edgeprune.sampling.denoising import velocity
from edgeprune.training import lora
from edgeprune.training.recipe import DistillOptions, adapt, parameter_groups
from edgeprune.training.rounding import Rounding
from edgeprune.training.whole import distill


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "z-image", "qwen-image"])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_trained_model_is_that_of_the_merged_weights(kind: str, rounded: bool) -> None:
    family, _, student, plan, report, _ = setup(kind)
    options = DistillOptions(train="lora:4")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    adapt(family, student, plan, recipe(options), options)
    parameter_groups(family, student, plan, report, recipe(options), 1e-3)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all(lora.is_low_rank(name) for name in trained)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    after = lora.merged(student.state_dict())
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    # Every linear layer of the blocks after the removed one, and nothing before it.
    layers = {f"{n}.weight" for n, m in setup(kind)[2].named_modules() if isinstance(m, nn.Linear)}
    places = {name: family.place(config_of(student), name) for name in layers}
    assert moved == {n for n, place in places.items() if place and plan.kept[place[0]] > plan.first_pruned}
    with torch.no_grad():
        if not rounded:
            found = velocity(student, *tiny_step())
        else:
            rounding = Rounding(family, student, 64)
            rounding.begin()
            found = velocity(student, *tiny_step())
            rounding.end()
            for name in layers:
                precision = precision_of(family, name, tuple(after[name].shape))
                if precision.bits == 4:
                    after[name] = round_int4(after[name], precision.group_size)
        merged = setup(kind)[2]
        merged.load_state_dict(after)
        assert (velocity(merged, *tiny_step()) - found).abs().max() <= 1e-5
        assert (velocity(setup(kind)[2], *tiny_step()) - found).abs().max() > 1e-3


def test_the_sum_that_is_rounded_is_the_one_that_ships_also_in_bf16() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64))
    lora.add(layer, ["0"], 8, 0)
    layer[0].lora_B["default"].weight.data.normal_()
    shipped = round_int4(lora.merged(layer.state_dict())["0.weight"], 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora.rounded(layer[0], 64, torch.eye(64)) - layer[0].base_layer.bias
    least_step = shipped.abs().amax(-1, keepdim=True) / 8
    assert ((found.T - shipped).abs() < 0.4 * least_step).all()


def train(path: Path, kind: str = "sd3", until: int | None = None, **changes: Any) -> Any:
    family, teacher, student, plan, report, pairs = setup(kind)
    options = DistillOptions(steps=30, batch=4, rate=5e-3, train="lora:8", **changes)

    class Killed(Exception):
        pass

    def progress(step: int, total: int, loss: float) -> None:
        if step == until:
            raise Killed

    try:
        return distill(
            family, teacher, student, plan, report, pairs, options, recipe(options), schedule(teacher), path,
            inputs_digest="x", guidance=3.5, save_every=2, progress=progress,
        )  # fmt: skip
    except Killed:
        return None


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_it_learns_and_resumes(tmp_path: Path, kind: str) -> None:
    start = setup(kind)[2].state_dict()
    state, losses = train(tmp_path / "whole", kind)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert state.keys() == start.keys()
    assert train(tmp_path / "killed", kind, until=7) is None
    again, resumed = train(tmp_path / "killed", kind)
    assert resumed == losses and all(torch.equal(again[name], state[name]) for name in state)
    assert (tmp_path / "whole").stat().st_size < sum(t.nbytes for t in start.values())


def test_without_peft_it_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "absent", lambda package: package == "peft")
    DistillOptions().check()
    with pytest.raises(MissingExtraError, match="peft"):
        DistillOptions(train="lora:4").check()


@pytest.mark.parametrize("given", ["lora", "lora:0", "lora:x", "none", ""])
def test_what_cannot_be_trained_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="--train: found .*, expected all or lora:R"):
        DistillOptions(train=given).check()
