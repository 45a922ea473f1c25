"""Z-Image on a device: text of any length, and whole images as in torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import traced

from edgeprune import runtimes, targets
from edgeprune.artefact.loading import load
from edgeprune.export import external_data, graph, modules, parity, to_onnx, to_openvino
from edgeprune.runtimes import base, networks
from edgeprune.sampling.denoising import encode_prompts

# Quick tests export FLUX.1, and run a Z-Image through all stages (test_z_image.py).
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # vendors' deprecations
PROMPTS = ["two red circles", "", "a small green ring left of a large blue star " * 9]
"""Of up to 32, 32 and 64 tokens with padding."""
NETWORKS = ("transformer", "text_encoder", "vae_decoder")


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    with tiny.shallow_z_image():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, shallow: None) -> Path:
    folder = tmp_path_factory.mktemp("z-image") / "base"
    tiny.tiny_z_image_pipeline(folder, guided=True, layers=2)
    return folder


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The export of each runtime."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("out")
    record = to_onnx.export(source, out / "onnx")
    assert list(record["parity"]) == list(NETWORKS)
    assert max(found["max_relative"] for found in record["parity"].values()) < 1e-4
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, out / "onnx", *NETWORKS)
        to_openvino.export(source, out / "openvino", device=targets.load("intel-igpu"))
    return {"ort": out / "onnx", "openvino": out / "openvino"}


def test_one_graph_takes_every_length_and_size(tmp_path: Path) -> None:
    """Rows of different lengths, and images whose tokens are no multiple of 32."""
    whole = modules.Transformer(tiny.tiny_z_image(n_layers=1)).eval()
    traced_with = whole.example(batch=2, height=4, width=6, tokens=5)
    external_data.save(graph.to_ir(whole, traced_with, whole.inputs, whole.outputs), tmp_path / "model.onnx")
    sizes = ((1, 3, 5, 7), (3, 8, 8, 40), (2, 5, 7, 70))
    examples = [whole.example(batch=b, height=h, width=w, tokens=m) for b, h, w, m in sizes]
    examples[1]["text_lengths"][:2] = examples[1]["text_lengths"].new_tensor([3, 32])
    runner = parity.session(tmp_path / "model.onnx")
    assert parity.check("transformer", runner, whole, examples, list(whole.outputs))["max_relative"] < 1e-4
    operators = {node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
    assert "Cos" in operators and not any("Complex" in name or name == "DFT" for name in operators)


@pytest.mark.parametrize("name", ["ort", "openvino"])
@pytest.mark.parametrize("free", [10**12, 0])
def test_same_seed_same_image_as_torch(
    folders: dict[str, Path], source: Path, name: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, which has two lengths in a step; most of the difference comes from the export's 8-bit text encoder."""
    monkeypatch.setattr(networks, "allowed", lambda: free)
    with runtimes.load(folders[name], name) as ours, runtimes.load(source) as theirs:
        assert ours.settings.generation == theirs.settings.generation
        text = theirs.backend.encode(PROMPTS[1:])
        latents = base.initial_latents(ours.settings, [1, 2], 48, 80)
        mine, reference = (m.step(latents, *text, np.asarray([0.9, 0.2], np.float32)) for m in (ours, theirs))
        assert np.linalg.norm(mine - reference) <= 1e-5 * np.linalg.norm(reference)
        for backend in (ours.backend, theirs.backend):
            monkeypatch.setattr(backend, "encode", lambda prompts, wanted=theirs.backend.encode: wanted(prompts))
        drawn = [m.generate(PROMPTS[2], seed=3)[0] for m in (ours, theirs)]
    pixels = [np.asarray(image, int) for image in drawn]
    assert pixels[1].std() > 5 and np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_a_device_finds_the_same_tokens(folders: dict[str, Path], source: Path, name: str) -> None:
    """Zeros where a prompt has none; the numbers differ by the export's 8 bits alone."""
    expected = encode_prompts(load(source), PROMPTS, 40).hidden.numpy()
    with runtimes.load(folders[name], name) as model:
        hidden, pooled = model.backend.encode(PROMPTS)
    assert hidden.shape == expected.shape and pooled.shape == (3, 0)
    np.testing.assert_array_equal((hidden != 0).any(-1), (expected != 0).any(-1))
    assert np.linalg.norm(hidden - expected) < 0.5 * np.linalg.norm(expected)
