"""Where the torch reference runs: the devices that torch finds, by the same names and choice as everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from second_device import MISSING, NAME, second_device
from tiny import tiny_pipeline

from edgeprune import runtimes
from edgeprune.common.errors import InputError
from edgeprune.runtimes import eager, memory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    folder = tmp_path_factory.mktemp("eager") / "source"
    tiny_pipeline(folder)
    return folder


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_it_takes_the_device_that_is_asked_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device that computes is what torch finds; each opening names where it runs, and why."""
    monkeypatch.setattr("edgeprune.residency.compute._here", lambda: {NAME: 1, "cpu": 1})
    found, images = [], []
    with second_device():
        for options in ({}, {"device": f"{NAME}:0"}, {"device": "cpu"}):
            with runtimes.load(source, "eager", **options) as model:
                images.append(np.asarray(model.generate("a", steps=1)[0]).astype(int))
                found.append((model.backend.provider, model.backend.why, model.backend.memory()["peak_bytes"].place))
        with pytest.raises(InputError, match="device: found 'cuda', expected one of auto, second, cpu, which torch"):
            runtimes.load(source, "eager", device="cuda")
    assert found == [
        (NAME, "torch finds a GPU", "gpu"), (f"{NAME}:0", f"device={NAME}:0", "gpu"), ("cpu", "device=cpu", "process"),
    ]  # fmt: skip
    assert all(abs(image - images[-1]).max() <= 1 for image in images)


def test_without_a_gpu_it_runs_on_the_processor(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.residency.compute._here", lambda: {"cpu": 1})
    with runtimes.load(source, "eager") as model:
        assert (model.backend.provider, model.backend.why) == ("cpu", "torch finds no GPU")


def test_the_memory_of_a_gpu_that_shares_the_machines_is_the_process_s() -> None:
    meter = memory.Meter()
    for shared in ("cpu", "mps"):
        assert eager.rows_of(torch.device(shared), meter) == meter.rows
