"""What becomes of the scales of either sign that NNCF chooses."""

from __future__ import annotations

import pytest
import torch

from edgeprune.quantization import quantize
from edgeprune.quantization.quantize import _nncf_integers, _positive


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


def chosen_by_nncf(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NNCF's integers (O, groups, I / groups) and scales (O, groups, 1) of either sign."""
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_positive", lambda _, values, scale: (values, scale))
        ((values, scale),) = _nncf_integers([weight], 64)
    return values.reshape(*scale.shape, -1).float(), scale.float()[..., None]


def rounded_again(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers and steps in which a group's largest weight is 7.5 steps, whatever NNCF chose."""
    step = (scale.abs() * 16 / 15).half().float()
    return (weight.reshape(*scale.shape[:2], -1) / step).round().clamp(-8, 7), step


def test_the_largest_weight_stays_within_half_a_step(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    values, scale = chosen_by_nncf(monkeypatch, weight)
    ((found, step),) = _nncf_integers([weight], 64)
    integers, larger = rounded_again(weight, scale)
    negative = scale < 0
    assert torch.equal(found.reshape(values.shape).float(), torch.where(negative, integers, values))
    assert torch.equal(step.float()[..., None], torch.where(negative, larger, scale).half().float())


def test_a_group_of_zeros_stays_zero() -> None:
    values, scale = torch.zeros(2, 64, dtype=torch.int8), torch.tensor([[1.0], [-1e-4]])
    found, step = _positive(torch.zeros(2, 64), values, scale)
    assert not found.any() and (step >= 0).all()
