"""Calibration of INT4: which inputs are kept, and what becomes of the scales that NNCF estimates from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.quantization import quantize
from edgeprune.quantization.quantize import _nncf_integers, _positive, _samples

STATES, TOKENS = 96, 200


def recorded() -> dict[str, torch.Tensor]:
    """Return the kept inputs of a layer whose two calls get rows of (state, token), and of one without tokens."""
    layers = {"tokens": nn.Linear(2, 4), "modulation": nn.Linear(1, 4)}
    state, token = torch.meshgrid(torch.arange(STATES), torch.arange(TOKENS), indexing="ij")
    rows = torch.stack([state, token], dim=-1).float()

    def run() -> None:
        for batch in rows.split(64):
            layers["tokens"](batch)
            layers["modulation"](batch[:, 0, :1])

    return _samples(layers, run)


def test_samples_cover_all_states_and_tokens() -> None:
    kept = recorded()
    states, tokens = kept["tokens"].T
    assert len(kept["tokens"]) == quantize._ROWS < STATES * TOKENS  # memory is bounded
    assert len(states.unique()) == STATES and len(tokens.unique()) > 0.95 * TOKENS
    # Even: neither an early call nor the first tokens are preferred. 1024 rows of these have a deviation of 0.009.
    assert abs(float(states.mean()) / (STATES - 1) - 0.5) < 0.04 > abs(float(tokens.mean()) / (TOKENS - 1) - 0.5)
    assert sorted(kept["modulation"].flatten().tolist()) == list(range(STATES))


def test_samples_are_seeded() -> None:
    first, again = recorded(), recorded()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs in which few channels carry most."""
    g = torch.Generator().manual_seed(0)
    channels = torch.exp(1.5 * torch.randn(128, generator=g))
    return torch.randn(96, 128, generator=g), torch.randn(512, 128, generator=g) * channels


def chosen_by_nncf(
    monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NNCF's integers (O, groups, I / groups) and scales (O, groups, 1) of either sign."""
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_positive", lambda _, values, scale, given: (values, scale))
        ((values, scale),) = _nncf_integers([weight], 64, inputs)
    return values.reshape(*scale.shape, -1).float(), scale.float()[..., None]


def rounded_again(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers and steps in which a group's largest weight is 7.5 steps, whatever NNCF estimated."""
    step = (scale.abs() * 16 / 15).half().float()
    return (weight.reshape(*scale.shape[:2], -1) / step).round().clamp(-8, 7), step


def output_error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the squared error of the output of each group, (O, groups)."""
    off = (found - weight.reshape(found.shape)).transpose(0, 1)  # (groups, O, 64)
    return (off @ inputs.reshape(len(inputs), len(off), -1).permute(1, 2, 0)).square().sum(-1).T


def test_an_estimated_scale_outlives_its_sign(
    monkeypatch: pytest.MonkeyPatch, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, inputs = layer
    values, scale = chosen_by_nncf(monkeypatch, weight, [inputs])
    ((found, step),) = _nncf_integers([weight], 64, [inputs])
    found, step = found.reshape(values.shape).float(), step.float()[..., None]
    negative = (scale < 0).expand_as(values)
    assert 0.3 < float(negative.float().mean()) < 0.7 and (step >= 0).all()
    assert torch.equal(found[~negative], values[~negative])
    mirrored = negative & (step == scale.abs().half().float())
    others = mirrored & (values != -8)
    assert torch.equal(found[others], -values[others]) and (found[mirrored & ~others] == 7).all()
    assert float(mirrored.sum() / negative.sum()) > 0.3
    before = output_error(weight, torch.mul(*rounded_again(weight, scale)), inputs)
    after = output_error(weight, found * step, inputs)
    assert (after <= before * 1.0001)[negative.all(-1)].all()  # no group is worse than if it were rounded again
    assert float(after[negative.all(-1)].sum()) < 0.93 * float(before[negative.all(-1)].sum())


def test_without_inputs_the_largest_weight_stays_within_half_a_step(
    monkeypatch: pytest.MonkeyPatch, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, _ = layer
    values, scale = chosen_by_nncf(monkeypatch, weight, [])
    ((found, step),) = _nncf_integers([weight], 64, [])
    integers, larger = rounded_again(weight, scale)
    negative = scale < 0
    assert torch.equal(found.reshape(values.shape).float(), torch.where(negative, integers, values))
    assert torch.equal(step.float()[..., None], torch.where(negative, larger, scale).half().float())


def test_a_group_of_zeros_stays_zero() -> None:
    values, scale = torch.zeros(2, 64, dtype=torch.int8), torch.tensor([[1.0], [-1e-4]])
    for inputs in (None, torch.ones(3, 64)):
        found, step = _positive(torch.zeros(2, 64), values, scale, inputs)
        assert not found.any() and (step >= 0).all()
