"""Half precision is tried at prompts that the folder's own encoders encode, not at random numbers of unit variance."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgeprune import runtimes, targets
from edgeprune.common.splits import Split
from edgeprune.export import loaders, parity, text, to_onnx, to_trt
from edgeprune.families.encoders import text_encoders
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.prompts import prompts

RTX = targets.load("rtx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose text has values of about 50, and whose context embedder overflows at them alone."""
    path = tmp_path_factory.mktemp("half") / "tiny"
    pipe = tiny.tiny_pipeline(path, num_layers=1)
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipe, name)
            embeddings = encoder.text_model.embeddings if hasattr(encoder, "text_model") else encoder.embeddings
            embeddings.token_embedding.weight.mul_(50 / embeddings.token_embedding.weight.abs().max())
            encoder.half().save_pretrained(path / name)
        embedder = pipe.transformer.context_embedder
        rows = embedder.weight.norm(dim=1).max()
        embedder.weight.mul_(4_000 / rows)  # unit variance gives about 4,000, at most some 16,000
        pipe.transformer.half().save_pretrained(path / "transformer")
    return path


def test_a_context_embedder_that_overflows_only_at_real_text(folder: Path) -> None:
    at_random = next(to_onnx.sources(folder))
    good, error, _ = to_trt._half_precision(at_random, RTX)
    assert good and error is not None and error < parity.HALF_BOUND
    at_prompts = next(to_onnx.sources(folder, half=True))
    assert at_prompts.trial["encoder_hidden_states"].shape == (text.PROMPTS, to_onnx.TRIED, 64)
    assert to_trt._half_precision(at_prompts, RTX) == (False, None, [])


def test_a_model_without_outliers_is_still_half(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "tiny", num_layers=1)
    for source in to_onnx.sources(tmp_path / "tiny", half=True):
        good, _, references = to_trt._half_precision(source, RTX)
        assert good and len(references) == 1
    assert source.name == "vae_decoder"


@pytest.mark.filterwarnings("ignore:.*tokens are cut")
def test_the_prompts_are_encoded_as_a_runtime_does(tiny_folders: tuple[Path, Path]) -> None:
    found = text.encoded(tiny_folders[0])
    with runtimes.load(tiny_folders[1], "ort") as model:
        hidden, pooled = model.backend.encode(prompts(Split.CALIBRATION, text.PROMPTS))
    order = np.argsort(-np.abs(hidden).max((1, 2)), kind="stable")
    np.testing.assert_allclose(found.hidden, hidden[order], atol=2e-5)
    np.testing.assert_allclose(found.pooled, pooled[order], atol=2e-5)


def test_core_ml_tries_them_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml

    seen = {}

    def network(name: str, parts: Any, reference: Any, examples: Any, path: Path, **_: Any) -> dict[str, Any]:
        seen[name] = examples
        (path / "model.mlpackage").touch()
        return {}

    monkeypatch.setattr(to_coreml, "convert_network", network)
    device = targets.load("macbook-m")
    to_coreml.export(folder, tmp_path / "out", device=device)
    expected = text.encoded(folder)
    assert [len(example["encoder_hidden_states"]) for example in seen["transformer"]] == [1, 2]
    for example in seen["transformer"]:
        rows = len(example["encoder_hidden_states"])
        torch.testing.assert_close(example["encoder_hidden_states"], expected.hidden[:rows])
    ids = text.tokens(folder, "text_encoder_2", "CLIPTextModelWithProjection")["input_ids"]
    assert torch.equal(seen["text_encoder_2"][0]["input_ids"], ids[:1])


def test_one_encoder_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tiny_pipeline(tmp_path / "tiny", t5=True)
    opened: list[Any] = []
    load = loaders.compared_encoder

    def watched(*arguments: Any) -> Any:
        assert not [one for one in opened if one() is not None]
        encoder = load(*arguments)
        opened.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(loaders, "compared_encoder", watched)
    found = text.encoded(tmp_path / "tiny")
    gc.collect()
    assert len(opened) == len(text_encoders(tmp_path / "tiny")) == 3
    assert not [one for one in opened if one() is not None]
    assert found.hidden.shape == (text.PROMPTS, tiny.TOKENS + tiny.T5_TOKENS, tiny.T5_WIDTH)


def test_the_tokens_with_the_largest_values_stay_in_order() -> None:
    hidden = torch.ones(2, 5, 3)
    hidden[0, 1], hidden[0, 4, 2], hidden[1, 0], hidden[1, 3, 0] = 7, -9, 3, -4
    kept = text.largest(Conditioning(hidden, torch.zeros(2, 3)), 2).hidden
    assert torch.equal(kept, torch.stack([hidden[0, [1, 4]], hidden[1, [0, 3]]]))
