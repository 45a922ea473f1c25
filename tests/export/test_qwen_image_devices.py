"""Qwen-Image for Core ML and TensorRT: the packages draw torch's images, and engines are built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgeprune import runtimes, targets
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.export import parity, to_trt
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import base

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # vendors' deprecations; test_z_image_devices.py
NETWORKS = ["transformer", "text_encoder", "vae_decoder"]
PROMPTS = ["a star above a ring", "two red circles"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided Qwen-Image of two blocks."""
    folder = tmp_path_factory.mktemp("qwen-image") / "source"
    tiny.tiny_qwen_image_pipeline(folder, num_layers=2)
    return folder


def test_core_ml(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml

    import coreml_fakes  # isort: skip  # after to_coreml, which keeps it quiet
    from edgeprune.runtimes import coreml

    monkeypatch.setattr(to_coreml, "CHUNK_BYTES", 1e5)
    record = to_coreml.export(source, tmp_path / "out", device=targets.load("macbook-m"))
    assert list(record["parity"]) == NETWORKS and record["encoders"] == {"text_encoder": "int8"}
    assert all(found["max_relative"] < 1e-3 and found["half_relative"] < 1e-2 for found in record["parity"].values())
    monkeypatch.setattr(coreml, "coremltools", coreml_fakes.FakeCoreML())
    length = tiny.QWEN_IMAGE_TOKENS
    hidden, pooled = (value.numpy() for value in StagedPipeline(source, None, Compute()).encode(PROMPTS, length))
    with runtimes.load(tmp_path / "out") as ours, runtimes.load(source) as theirs:
        found = ours.backend.encode(PROMPTS)[0]
        np.testing.assert_array_equal((found != 0).any(-1), (hidden != 0).any(-1))
        # Most of the difference comes from the weights of 8 bits.
        assert np.linalg.norm(found - hidden) <= 0.05 * np.linalg.norm(hidden)
        latents = base.initial_latents(ours.settings, [1, 2], 64, 64)
        steps = [m.step(latents, hidden, pooled, np.asarray([0.7, 0.3], np.float32)) for m in (ours, theirs)]
        assert parity.relative_error(*steps)[0] < 1e-3  # one text is shorter, and padded
        for model in (ours, theirs):
            monkeypatch.setattr(model.backend, "encode", lambda prompts, wanted=theirs.backend.encode: wanted(prompts))
        drawn = [np.asarray(model.generate(PROMPTS[0], seed=3)[0], int) for model in (ours, theirs)]
    assert drawn[1].std() > 5 and np.abs(drawn[0] - drawn[1]).max() <= 2


def test_tensorrt(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = to_trt.export(source, tmp_path / "out", device=targets.load("rtx"))
    assert list(record["parity"]) == NETWORKS == list(record["networks"])
    for name, found in record["networks"].items():
        assert 0 < record["parity"][name]["rms_relative"] < parity.HALF_BOUND
        assert (tmp_path / "out" / name / "model.engine").stat().st_size == found["engine_bytes"] > 1000
    assert record["networks"]["text_encoder"]["int8_layers"] == 3 * 7
    assert json.loads((tmp_path / "out" / "tokenizer" / "chat.json").read_text())["prefix"]
