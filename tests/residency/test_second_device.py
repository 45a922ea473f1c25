"""The second device of the tests has a GPU's rules; and memory on it is held and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from second_device import MISSING, NAME, TOTAL_BYTES, second_device
from tiny import stored, tiny_step, tiny_transformer

from edgeprune.residency.compute import Compute
from edgeprune.sampling.denoising import evaluate

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
CPU = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "a product of two devices": lambda x: x @ CPU,
    "a layer elsewhere": lambda x: torch.nn.functional.linear(x, CPU),
    "a sum of two devices": lambda x: x + CPU,
    "a list of two devices": lambda x: torch.cat([x, CPU]),
    "numbers in a list": lambda x: torch.stack([x[0, 0], CPU[0, 0]]),
    "ids elsewhere": lambda x: torch.nn.functional.embedding(torch.tensor([1]), x),
    "values elsewhere": lambda x: x.index_put_((torch.tensor([0]),), CPU[:1]),
    "indices on the device": lambda x: CPU[(x[0] > 0).nonzero()[:, 0]],
    "a generator elsewhere": lambda x: torch.randn(2, device=NAME, generator=torch.Generator()),
    "numpy": lambda x: x.numpy(),
    "numpy of a parameter": lambda x: torch.nn.Parameter(x).detach().numpy(),
    "an array": lambda x: np.asarray(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(name: str) -> None:
    with second_device(), pytest.raises((RuntimeError, TypeError), match="same device|generator|Use Tensor.cpu"):
        REFUSED[name](CPU.to(NAME))


def test_what_a_gpu_takes() -> None:
    with second_device() as device:
        x = CPU.to(NAME)
        assert x.device == device.device and (x + torch.tensor(1.0)).device == device.device
        torch.testing.assert_close((x @ x.T).cpu(), CPU @ CPU.T)
        torch.testing.assert_close(x[torch.tensor([1, 0])].cpu(), CPU[[1, 0]])
        assert float(x[0, 0]) == float(CPU[0, 0]) and x.tolist() == CPU.tolist()
        x[0] = 7
        assert x.view(16).cpu()[:4].tolist() == [7] * 4 and CPU[0, 0] != 7
        weight = torch.nn.Parameter(torch.ones(4, 4, device=NAME))
        (x @ weight).sum().backward()
        assert weight.grad is not None and weight.grad.device == device.device
        with torch.inference_mode():
            assert torch.tensor([1.5], device=NAME).half().cpu().numpy() == [1.5]
    assert not torch.second.is_available()


def test_bytes_are_those_that_are_alive() -> None:
    with second_device() as device:
        x = torch.zeros(1000, device=NAME)
        view = x.view(10, 100)
        assert device.bytes == 4000
        del x
        assert device.bytes == 4000 and Compute(device.device).left() == int(0.9 * (TOTAL_BYTES - 4000))
        del view
        assert device.bytes == 0 and device.most_bytes == 4000


@torch.no_grad()
def test_a_model_that_is_read_holds_little_on_the_device() -> None:
    model = tiny_transformer(num_layers=6)
    expected, size = evaluate(model, *tiny_step()), sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    peaks = []
    for keep in (7, 2):
        with second_device() as device:
            made = stored(model).running(torch.float32, device.device, keep=keep * block)
            torch.testing.assert_close(evaluate(made, *tiny_step()), expected, rtol=1e-5, atol=1e-5)
            peaks.append(device.most_bytes)
    assert peaks[0] > size and peaks[0] - 4 * block < peaks[1] < peaks[0] - 2 * block
