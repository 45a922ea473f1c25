"""The ONNX folder, unchanged, in optimum's ORTStableDiffusion3Pipeline and ORTFluxPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
from drawing import PROMPT, STEPS, drawn, ours

from edgeprune.common.files import sha256_file

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # vendors' deprecations


@pytest.fixture
def client() -> Any:
    """The class; imported here, where the warnings of its import are let pass."""
    from optimum.onnxruntime import ORTStableDiffusion3Pipeline

    return ORTStableDiffusion3Pipeline


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def in_floats() -> onnxruntime.SessionOptions:
    """ONNX Runtime computes quantised layers in floats, as ours does."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def test_draws_what_our_runtime_draws(client: Any, exported: Path) -> None:
    """From the same latents every pixel to 1 of 255."""
    before = hashes(exported)
    pipe = client.from_pretrained(exported, session_options=in_floats())
    assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)
    image, reference = drawn(pipe, exported), ours(exported, "ort")
    assert reference.std() > 5 and np.abs(image - reference).max() <= 1
    assert hashes(exported) == before


def test_with_no_options_at_all(client: Any, exported: Path) -> None:
    """ONNX Runtime then rounds activations to int8, which moves few pixels; and a call may leave everything out that
    our runtimes set: an absent T5's zero tokens are then added to the prompt.
    """
    pipe = client.from_pretrained(exported)
    assert np.abs(drawn(pipe, exported) - ours(exported, "ort")).mean() < 2
    image = np.asarray(pipe(PROMPT, num_inference_steps=STEPS, height=64, width=64).images[0])
    assert image.shape == (64, 64, 3) and image.std() > 5


def test_draws_with_a_t5(client: Any, tmp_path: Path) -> None:
    from edgeprune.export.to_onnx import export

    tiny.tiny_pipeline(tmp_path / "source", t5=True, num_layers=1)
    export(tmp_path / "source", tmp_path / "onnx")
    pipe = client.from_pretrained(tmp_path / "onnx", session_options=in_floats())
    assert pipe.text_encoder_3 is not None
    image, reference = drawn(pipe, tmp_path / "onnx"), ours(tmp_path / "onnx", "ort")
    assert reference.std() > 5 and np.abs(image - reference).max() <= 1


@pytest.mark.parametrize("variant", [{"guidance_embeds": True}, {"guidance_embeds": False}], ids=["dev", "schnell"])
def test_flux_draws_what_our_runtime_draws(variant: dict[str, bool], tmp_path: Path) -> None:
    """The pipeline packs latents and makes positions as our runtimes do; of schnell it reads no guidance scale."""
    import torch
    from optimum.onnxruntime import ORTFluxPipeline

    from edgeprune import runtimes
    from edgeprune.export.to_onnx import export
    from edgeprune.runtimes.base import initial_latents

    tiny.tiny_flux_pipeline(tmp_path / "source", **variant)
    export(tmp_path / "source", tmp_path / "onnx")
    pipe = ORTFluxPipeline.from_pretrained(tmp_path / "onnx", session_options=in_floats())
    with runtimes.load(tmp_path / "onnx", "ort") as model:
        scale = 3.0 if variant["guidance_embeds"] else 0.0
        reference = np.asarray(model.generate(PROMPT, seed=3, steps=STEPS, guidance_scale=scale)[0], int)
        noise = torch.from_numpy(initial_latents(model.settings, [3], 64, 64))
    image = pipe(
        PROMPT, latents=pipe._pack_latents(noise, 1, 8, 8, 8), num_inference_steps=STEPS, guidance_scale=3.0,
        height=64, width=64, max_sequence_length=24,
    ).images[0]  # fmt: skip
    assert reference.std() > 5 and np.abs(np.asarray(image, int) - reference).max() <= 1
