"""Z-Image for Core ML and TensorRT: the packages draw torch's images, and engines are built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file

from edgeprune import runtimes, targets
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.export import modules, parity, to_trt
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import base

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
NETWORKS = ["transformer", "text_encoder", "vae_decoder"]
PROMPTS = ["a star above a ring " * 9, "two red circles"]
"""Of up to 64 and 32 tokens with padding."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A guided Z-Image of two blocks, whose text encoder has a layer that is not read.

    As in the published weights, values inside an MLP exceed half precision; a norm follows.
    """
    folder = tmp_path_factory.mktemp("z-image") / "source"
    with tiny.shallow_z_image(3):
        tiny.tiny_z_image_pipeline(folder, guided=True, layers=3, n_layers=2)
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        large = {f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w3")}
        save_file({n: t * 1000 if n in large else t for n, t in load_file(path).items()}, path)
        yield folder


@pytest.mark.slow  # test_coreml.py and test_coreml_text.py convert the parts of SD3 and of a T5
def test_core_ml(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk without the pad tokens and the refiners follows one that has them; two lengths of text are in a call."""
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
    hidden, pooled = (value.numpy() for value in StagedPipeline(source, None, Compute()).encode(PROMPTS, 40))
    with runtimes.load(tmp_path / "out") as ours, runtimes.load(source) as theirs:
        found = ours.backend.encode(PROMPTS)[0]
        np.testing.assert_array_equal((found != 0).any(-1), (hidden != 0).any(-1))
        assert (found != 0).any(-1).sum(-1)[0] > 32 and (found != 0).any(-1).sum(-1)[1] < 32
        # Most of the difference comes from the weights of 8 bits.
        assert np.linalg.norm(found - hidden) <= 0.05 * np.linalg.norm(hidden)
        latents = base.initial_latents(ours.settings, [1, 2], 64, 64)
        steps = [m.step(latents, hidden, pooled, np.asarray([0.7, 0.3], np.float32)) for m in (ours, theirs)]
        assert parity.relative_error(*steps)[0] < 1e-3
        for model in (ours, theirs):
            monkeypatch.setattr(model.backend, "encode", lambda prompts, wanted=theirs.backend.encode: wanted(prompts))
        drawn = [np.asarray(model.generate(PROMPTS[0], seed=3)[0], int) for model in (ours, theirs)]
    assert drawn[1].std() > 5 and np.abs(drawn[0] - drawn[1]).max() <= 2


def test_engine_profiles_are_of_padded_tokens(source: Path) -> None:
    """From the model's 64 x 64 pixels, whose 16 tokens are padded, up to 225 tokens of the device's 240 x 240."""
    whole = modules.Transformer(tiny.tiny_z_image(cap_feat_dim=tiny.QWEN_WIDTH, n_layers=1))
    device, settings = dataclasses.replace(targets.load("rtx"), side=(64, 240)), base.read_settings(source)
    sizes = to_trt.axis_ranges(device, settings, 32, 64)
    profile = to_trt.profile_of(whole.inputs, whole.example(batch=2, height=2, width=2, tokens=5), sizes)
    assert profile == {
        "hidden_states": ((1, 32, 32), (2, 32, 32), (2, 256, 32)),
        "encoder_hidden_states": ((1, 1, 32), (2, 64, 32), (2, 64, 32)),
        "timestep": ((1,), (2,), (2,)), "img_ids": ((32, 3), (32, 3), (256, 3)), "text_lengths": ((1,), (2,), (2,)),
    }  # fmt: skip
    assert sizes["height"] == sizes["width"] == (8, 8, 30)
    smallest = to_trt._smallest(whole, sizes)
    assert smallest["hidden_states"].shape == (1, 32, 32) and smallest["text_lengths"].tolist() == [64]


@pytest.mark.slow
def test_tensorrt(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = to_trt.export(source, tmp_path / "out", device=targets.load("rtx"))
    assert list(record["parity"]) == NETWORKS == list(record["networks"])
    for name, found in record["networks"].items():
        assert found["precision"] == ("float32" if name == "transformer" else "float16")
        assert 0 < record["parity"][name]["rms_relative"] < parity.HALF_BOUND
        assert (tmp_path / "out" / name / "model.engine").stat().st_size == found["engine_bytes"] > 1000
    text = record["networks"]["text_encoder"]
    assert text["int8_layers"] == 2 * 7
    assert text["profile"] == dict.fromkeys(("input_ids", "attention_mask"), [[1, 1], [2, 40], [2, 40]])
    assert json.loads((tmp_path / "out" / "tokenizer" / "chat.json").read_text())["prefix"]
