"""Where training runs: on the device that is asked for, and what that cannot train is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.residency.compute import Compute
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import EIGHT_BIT, HERE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two GPUs that cannot compute: torch finds them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("two_gpus")
def test_it_trains_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in a process, in other number formats, too; accelerate alone keeps the first."""
    for device, precision in ((GPU, "no"), (CPU, "bf16"), (torch.device("meta"), "no")):
        made = Parallel(precision, 4, HERE, device)
        assert made.device == device and made.accelerator.mixed_precision == precision
        assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")  # the user's own
    assert Parallel("no", 4, HERE, CPU).device == CPU and os.environ["ACCELERATE_TORCH_DEVICE"] == "cuda:0"


@pytest.mark.usefixtures("two_gpus")
def test_of_several_processes_each_trains_where_accelerate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in (GPU, torch.device("cuda"), Compute.of(ComputeOptions()).device):
        Parallel.check("no", 4, HERE, device)
    with pytest.raises(InputError, match="--device: found cpu, but accelerate starts this process to train on cuda:1"):
        Parallel.check("no", 4, HERE, CPU)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert processes.on_cpu() and Compute.of(ComputeOptions()).device == CPU
    Parallel.check("no", 4, HERE, CPU)
    with pytest.raises(InputError, match="--device: found cuda:1, but accelerate starts this process to train on cpu"):
        Parallel.check("no", 4, HERE, GPU)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="found cuda:1, but accelerate's config says use_cpu: true; give cpu"):
        Parallel.check("no", 4, HERE, GPU)


def test_what_a_device_cannot_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mac = torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    for device in (CPU, mac, torch.device("xpu")):
        with pytest.raises(InputError, match=f"found fp16, expected no or bf16 on {device.type}: it needs a CUDA GPU"):
            Parallel.check("fp16", 4, HERE, device)
    Parallel.check("fp16", 4, HERE, GPU)
    with pytest.raises(InputError, match="--mixed-precision: found bf16, expected no on mps before macOS 14"):
        Parallel.check("bf16", 4, HERE, mac)
    with pytest.raises(InputError, match="--optimizer: found adamw8bit, expected adamw on mps"):
        Parallel.check("no", 4, HERE, mac, EIGHT_BIT)
    Parallel.check("no", 4, HERE, mac)
