"""AdamW with moments of a byte each: what it holds, that it learns alike, and that it resumes to the same bytes.

`make check-matrix` installs bitsandbytes; the usual environment has none, because diffusers imports it everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import run, saved
from torch import nn

from edgeprune.common import extras
from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.training import eight_bit
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import EIGHT_BIT, DistillOptions, Placement
from edgeprune.training.resume import fill_optimizer, read_state, save_state


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have few weights of thousands of numbers."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(eight_bit, "LEAST", 512)


def optimizer(*layers: nn.Linear) -> Any:
    return eight_bit.adamw([{"params": [*layer.parameters()]} for layer in layers], lr=1e-2, betas=(0.9, 0.99))


def trained(layer: nn.Linear, made: Any, steps: int) -> None:
    draw = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        made.zero_grad()
        layer(torch.randn(4, layer.in_features, generator=draw)).square().mean().backward()
        made.step()


@pytest.mark.usefixtures("small")
def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path: Path) -> None:
    whole, losses = run(tmp_path / "whole.safetensors", 8, optimizer=EIGHT_BIT)
    run(tmp_path / "killed.safetensors", 8, until=5, optimizer=EIGHT_BIT)
    slots = saved(tmp_path / "killed.safetensors")[0]["optimizer"]
    assert sum(name.endswith("state1") and t.dtype == torch.uint8 for name, t in slots.items()) > 5
    again, resumed = run(tmp_path / "killed.safetensors", 8, optimizer=EIGHT_BIT)
    assert resumed == losses
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.usefixtures("small")
def test_it_learns_as_adamw_does(tmp_path: Path) -> None:
    _, exact = run(tmp_path / "exact.safetensors", 12)
    _, losses = run(tmp_path / "rounded.safetensors", 12, optimizer=EIGHT_BIT)
    assert losses[0] == exact[0] and losses[-1] != exact[-1]
    assert losses[-1] == pytest.approx(exact[-1], rel=0.05)


@pytest.mark.usefixtures("small")
def test_the_forecast_is_what_it_holds() -> None:
    layer = nn.Linear(48, 33)
    made = optimizer(layer)
    trained(layer, made, 1)
    held = [t for slots in made.state_dict()["state"].values() for t in slots.values() if torch.is_tensor(t)]
    assert eight_bit.moments_bytes([*layer.parameters()]) == sum(t.nbytes for t in held)
    assert {t.dtype for t in held} == {torch.uint8, torch.float32}


@pytest.mark.usefixtures("small")
def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    layer, other = nn.Linear(48, 33), nn.Linear(33, 48)
    made = optimizer(layer)
    trained(layer, made, 2)
    path = tmp_path / "state.safetensors"
    save_state(path, {}, made, {"step": 2})
    with pytest.raises(InputError, match=r"optimizer/0/state1: found .* expected .* delete the file"):
        fill_optimizer(path, optimizer(other), read_state(path)[1])


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for kind in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
        with pytest.raises(InputError, match="--optimizer: found adamw8bit, expected adamw where"):
            Parallel.check("no", 4, Placement(), cpu, EIGHT_BIT)
        with pytest.raises(InputError, match="--ema-offload"):
            Parallel.check("no", 4, Placement(ema_offload=True), cpu)
        monkeypatch.delenv(f"ACCELERATE_USE_{kind}")
    Parallel.check("no", 4, Placement(ema_offload=True), cpu, EIGHT_BIT)
    with pytest.raises(InputError, match="--batch: found 4, expected a multiple of 3, the number of processes times"):
        Parallel.check("no", 4, Placement(accumulate=3), cpu)
    monkeypatch.setattr(extras, "absent", lambda package: package == "bitsandbytes")
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        DistillOptions(optimizer=EIGHT_BIT).check()
