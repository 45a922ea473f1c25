"""FLUX.2 klein for Core ML and TensorRT: the packages draw torch's images, and engines are built, in half precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgeprune import runtimes, targets
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.export import parity
from edgeprune.residency.compute import Compute

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
NETWORKS = ["transformer", "text_encoder", "vae_decoder"]
PROMPT = "two red circles"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A klein of two blocks, whose text encoder is read at layers 1, 3 and 4."""
    folder = tmp_path_factory.mktemp("klein") / "source"
    with tiny.shallow_klein((1, 3, 4)):
        tiny.tiny_klein_pipeline(folder, num_layers=1, num_single_layers=1)
        yield folder


@pytest.mark.slow  # test_coreml.py and test_coreml_text.py convert the parts of SD3 and of a T5
def test_core_ml(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer and text encoder are chunks: states come from several, and each reads the mask of the prompt."""
    pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml

    import coreml_fakes  # isort: skip  # after to_coreml, which keeps it quiet
    from edgeprune.runtimes import coreml

    monkeypatch.setattr(to_coreml, "CHUNK_BYTES", 1e5)
    record = to_coreml.export(source, tmp_path / "out", device=targets.load("macbook-m"))
    assert list(record["parity"]) == NETWORKS and record["encoders"] == {"text_encoder": "int8"}
    assert record["chunks"] == {"transformer": 2, "text_encoder": 2}
    assert all(found["max_relative"] < 1e-3 and found["half_relative"] < 1e-2 for found in record["parity"].values())
    monkeypatch.setattr(coreml, "coremltools", coreml_fakes.FakeCoreML())
    # Most of the difference comes from the weights of 8 bits.
    text = tuple(value.numpy() for value in StagedPipeline(source, None, Compute()).encode([PROMPT], 40))
    with runtimes.load(tmp_path / "out") as ours, runtimes.load(source) as theirs:
        assert ours.name == "coreml"
        for mine, reference in zip(ours.backend.encode([PROMPT]), text, strict=True):
            assert mine.shape == reference.shape
            assert np.linalg.norm(mine - reference) <= 0.05 * np.linalg.norm(reference)
        latents = np.random.default_rng(1).standard_normal((1, 8, 8, 8), dtype=np.float32)
        steps = [model.step(latents, *text, np.asarray([0.7], np.float32)) for model in (ours, theirs)]
        assert parity.relative_error(*steps)[0] < 1e-3
        for model in (ours, theirs):
            monkeypatch.setattr(model.backend, "encode", lambda prompts: text)
        drawn = [np.asarray(model.generate(PROMPT, seed=3)[0], int) for model in (ours, theirs)]
    assert drawn[1].std() > 5 and np.abs(drawn[0] - drawn[1]).max() <= 2


@pytest.mark.slow  # three engines are built
def test_tensorrt(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgeprune.export import to_trt

    record = to_trt.export(source, tmp_path / "out", device=targets.load("rtx"))
    assert list(record["parity"]) == NETWORKS == list(record["networks"])
    for name, found in record["networks"].items():
        assert found["precision"] == "float16", name
        assert 0 < record["parity"][name]["rms_relative"] < parity.HALF_BOUND
        assert (tmp_path / "out" / name / "model.engine").stat().st_size == found["engine_bytes"] > 1000
    text = record["networks"]["text_encoder"]
    assert text["int8_layers"] == 4 * 7
    assert text["profile"] == dict.fromkeys(("input_ids", "attention_mask"), [[1, 1], [2, 40], [2, 40]])
    assert json.loads((tmp_path / "out" / "tokenizer" / "chat.json").read_text())["prefix"]
