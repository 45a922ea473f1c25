"""Qwen-Image on a device: text of any length, modulation apart from it, and whole images as in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import traced

from edgeprune import runtimes, targets
from edgeprune.artefact.loading import load
from edgeprune.common.files import read_json
from edgeprune.export import to_onnx, to_openvino
from edgeprune.runtimes import base, networks
from edgeprune.runtimes.modulation import ROWS
from edgeprune.sampling.denoising import encode_prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "", "a small green ring left of a large blue star " * 9]
NETWORKS = (ROWS, "transformer", "text_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen-image") / "model"
    tiny.tiny_qwen_image_pipeline(folder, num_layers=2)
    return folder


EXPORTED = pytest.mark.slow
"""What needs the export: four traces. The parts are those of families that are exported in quick tests."""


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The export of each runtime; each network is compared with diffusers' and transformers' own forward pass."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("out")
    record = to_onnx.export(source, out / "onnx", modulation="apart")
    assert list(record["parity"]) == list(NETWORKS)
    assert max(found["max_relative"] for found in record["parity"].values()) < 1e-4
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, out / "onnx", *NETWORKS)
        to_openvino.export(source, out / "openvino", device=targets.load("intel-igpu"), modulation="apart")
    return {"ort": out / "onnx", "openvino": out / "openvino"}


@EXPORTED
def test_the_files_hold_what_is_read_alone(folders: dict[str, Path]) -> None:
    """No complex numbers, no axis of time, no vision tower, and no text in the modulation."""
    graphs = {name: onnx.load(str(folders["ort"] / name / "model.onnx"), load_external_data=False) for name in NETWORKS}
    inputs = {name: [value.name for value in graph.graph.input] for name, graph in graphs.items()}
    assert inputs[ROWS] == ["timestep"]
    assert inputs["transformer"] == ["hidden_states", "encoder_hidden_states", "img_ids", "txt_ids", ROWS]
    operators = {node.op_type for graph in graphs.values() for node in graph.graph.node}
    assert not any("Complex" in name or name == "DFT" for name in operators)
    shapes = {one.name: one.dims for graph in graphs.values() for one in graph.graph.initializer}
    assert max(map(len, shapes.values())) == 4
    assert not [name for name in shapes if "visual" in name or "lm_head" in name]
    assert not [one.name for one in graphs["transformer"].graph.initializer if "_mod.1" in one.name]


@EXPORTED
@pytest.mark.parametrize("name", ["ort", "openvino"])
@pytest.mark.parametrize("free", [10**12, 0])
def test_same_seed_same_image_as_torch(
    folders: dict[str, Path], source: Path, name: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, in memory and network by network; most of the difference comes from the 8-bit text encoder."""
    monkeypatch.setattr(networks, "allowed", lambda: free)
    with runtimes.load(folders[name], name) as ours, runtimes.load(source) as theirs:
        assert ours.settings.generation == theirs.settings.generation
        text = theirs.backend.encode(PROMPTS[:2])
        latents = base.initial_latents(ours.settings, [1, 2], 48, 80)
        mine, reference = (m.step(latents, *text, np.asarray([0.9, 0.2], np.float32)) for m in (ours, theirs))
        assert np.linalg.norm(mine - reference) <= 1e-5 * np.linalg.norm(reference)
        for backend in (ours.backend, theirs.backend):
            monkeypatch.setattr(backend, "encode", lambda prompts, wanted=theirs.backend.encode: wanted(prompts))
        drawn = [m.generate(PROMPTS[2], seed=3, guidance_scale=4.0)[0] for m in (ours, theirs)]
    pixels = [np.asarray(image, int) for image in drawn]
    assert pixels[1].std() > 5 and np.abs(pixels[0] - pixels[1]).max() <= 1


@EXPORTED
@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_a_device_finds_the_same_tokens(folders: dict[str, Path], source: Path, name: str) -> None:
    """Without those of the instruction, and zeros where a prompt has none; numbers differ by the export's 8 bits."""
    expected = encode_prompts(load(source), PROMPTS, tiny.QWEN_IMAGE_TOKENS).hidden.numpy()
    with runtimes.load(folders[name], name) as model:
        hidden, pooled = model.backend.encode(PROMPTS)
    assert hidden.shape == expected.shape and pooled.shape == (3, 0)
    np.testing.assert_array_equal((hidden != 0).any(-1), (expected != 0).any(-1))
    assert np.linalg.norm(hidden - expected) < 0.5 * np.linalg.norm(expected)


@EXPORTED
def test_an_export_says_how_latents_are_scaled(folders: dict[str, Path], source: Path) -> None:
    found = [read_json(folder / "config.json") for folder in (folders["ort"] / "vae_decoder", source / "vae")]
    assert all(found[0][name] == found[1][name] for name in ("latents_mean", "latents_std", "z_dim"))
