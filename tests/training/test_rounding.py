"""Training on rounded weights: gradients pass straight through, and rounding twice instead of keeping is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.quantization.int4 import round_int4
from edgeprune.training import rounding


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 96)


def trained(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of input, weight and bias."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    out = rounding._rounded(layer, 64, x)
    out.float().square().sum().backward()
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_a_weight_that_is_rounded_again_learns_the_same(
    layer: nn.Linear, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 7, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        kept = trained(layer, x)
        monkeypatch.setattr(rounding, "_LARGE", 1)
        again = trained(layer, x)
    for one, other in zip(kept, again, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=1e-2 if mixed else 1e-5, atol=1e-5)
    exact = torch.nn.functional.linear(x, round_int4(layer.weight.detach(), 64), layer.bias)
    torch.testing.assert_close(kept[0].float(), exact, rtol=2e-2 if mixed else 1e-6, atol=5e-2 if mixed else 1e-6)


@pytest.mark.parametrize(("large", "copies"), [(1, 0), (10**9, 1)], ids=["rounded again", "kept"])
def test_autograd_keeps_no_copy_of_a_large_weight(
    layer: nn.Linear, large: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_LARGE", large)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def same(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    x: Any = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, same):
        rounding._rounded(layer, 64, x)
    own = layer.weight.untyped_storage().data_ptr()
    others = [t for t in saved if t.numel() == layer.weight.numel() and t.untyped_storage().data_ptr() != own]
    assert len(others) == copies


def test_frozen_parts_get_no_gradient(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_LARGE", 1)
    layer.requires_grad_(False)
    x = torch.randn(3, 128, requires_grad=True)
    rounding._rounded(layer, 64, x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, round_int4(layer.weight, 64).sum(0).expand(3, -1))
