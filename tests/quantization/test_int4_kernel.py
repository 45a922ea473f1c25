"""torch's INT4 kernel computes our numbers; on the processor, where torch has the same arithmetic under other names.

The layouts that only a GPU has are stand-ins here: `make check-gpu` tries them (`int4-kernel`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgeprune.quantization import int4, int4_kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel of the processor under the names of the GPU's; the rows of each call."""
    rows = list[int]()

    def convert(weight: torch.Tensor, tiles: int) -> torch.Tensor:
        assert weight.dtype == torch.uint8 and weight.is_contiguous() and weight.shape[1] * 2 % (16 * tiles) == 0
        unsigned = torch.stack([weight >> 4, weight & 0xF], -1).flatten(1)  # the upper nibble is the even input
        return torch._convert_weight_to_int4pack_for_cpu(unsigned.int(), 1)

    def multiply(x: torch.Tensor, weight: torch.Tensor, group_size: int, scales: torch.Tensor) -> torch.Tensor:
        assert x.dtype == scales.dtype == torch.bfloat16 and x.is_contiguous() and scales.is_contiguous()
        rows.append(len(x))
        return torch._weight_int4pack_mm_for_cpu(x, weight, group_size, scales)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    return rows


def layer(outputs: int, inputs: int, group_size: int) -> int4.PackedLinear:
    """A layer with every integer, scales of both signs, and a bias."""
    draw = torch.Generator().manual_seed(0)
    made = int4.PackedLinear(inputs, outputs, bits=4, group_size=group_size)
    made.weight_packed.copy_(int4.pack(torch.randint(-8, 8, (outputs, inputs), generator=draw), 4))
    made.weight_scale.copy_(torch.randn(made.weight_scale.shape, generator=draw) / 100)
    assert made.bias is not None
    made.bias.copy_(torch.randn(outputs, generator=draw))
    return made


@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(64, 128, 32), (16, 256, 64), (48, 384, 128)])
def test_it_multiplies_by_the_same_weights(outputs: int, inputs: int, group_size: int, kernel: list[int]) -> None:
    made = layer(outputs, inputs, group_size)
    x = torch.randn(3, 2, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = int4_kernel.linear(x, made.weight_packed, made.weight_scale).float()
    assert found.shape == (3, 2, outputs) and kernel == [6]
    rounded = made.weight_scale.bfloat16()
    weight = int4.dequantize(made.weight_packed, rounded, 4, torch.float32)
    expected = x.float() @ weight.T
    assert (found - expected).norm() < 4e-3 * expected.norm()  # of one rounding to bf16


def test_few_rows_go_through_it_and_others_are_unpacked(kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made, drawn = layer(64, 128, 64), torch.Generator().manual_seed(1)
    monkeypatch.setattr(int4_kernel, "takes", lambda x, *_: x.numel() <= int4_kernel.ROWS * x.shape[-1])
    for rows, through in ((1, [1]), (16, [1, 16]), (17, [1, 16])):
        x = torch.randn(rows, 128, generator=drawn).bfloat16()
        found = made(x)
        assert kernel == through
        assert made.bias is not None
        expected = x.float() @ made.weight.T + made.bias
        assert (found.float() - expected).norm() < 8e-3 * expected.norm()


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    def takes(rows: int = 1, inputs: int = 128, outputs: int = 64, group_size: int = 64, **other: Any) -> bool:
        x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(rows, inputs), numel=lambda: rows * inputs)
        packed, scale = torch.zeros(outputs, inputs // 2), torch.zeros(outputs, inputs // group_size)
        bits = other.pop("bits", 4)
        return int4_kernel.takes(SimpleNamespace(**vars(x) | {"device": "cuda"} | other), packed, scale, bits)  # type: ignore[arg-type]

    capability = (8, 0)
    assert takes() and takes(rows=16) and takes(group_size=32) and takes(inputs=2432, outputs=6 * 2432)
    refused = [{"rows": 17}, {"inputs": 192}, {"group_size": 16}, {"outputs": 20}, {"bits": 8}, {"is_cuda": False}]
    assert not any(takes(**one) for one in [*refused, {"dtype": torch.float16}])
    capability = (7, 5)
    assert not takes()
