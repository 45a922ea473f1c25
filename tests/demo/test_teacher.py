"""The built-in teacher: complete, small, loaded by stock diffusers, and drawing what the prompt asks for."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune import shapes
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.sampling.generation import Generation


@pytest.fixture(scope="module")
def pipe():  # type: ignore[no-untyped-def]
    from diffusers import StableDiffusion3Pipeline

    found = StableDiffusion3Pipeline.from_pretrained(BUILTIN, text_encoder_3=None, tokenizer_3=None).to("cpu")
    found.set_progress_bar_config(disable=True)
    return found


def test_weights_fit_in_20_mb() -> None:
    assert sum(p.stat().st_size for p in BUILTIN.rglob("*") if p.is_file()) <= 20e6


def test_it_is_a_real_mmdit(pipe) -> None:  # type: ignore[no-untyped-def]
    config = pipe.transformer.config
    assert config.num_layers >= 12 and config.qk_norm == "rms_norm"
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert json.loads((BUILTIN / "generation.json").read_text())["height"] == shapes.SIZE


def test_stock_diffusers_draws_better_than_chance(pipe) -> None:  # type: ignore[no-untyped-def]
    """Check that the weights are intact; the model card has the score."""
    import torch

    generation = Generation.load(BUILTIN)
    chosen = [p for p in shapes.evaluation_prompts(8) if p.meaning.task in ("colors", "typography")]
    images = pipe(
        [p.text for p in chosen], height=64, width=64, num_inference_steps=generation.num_inference_steps,
        guidance_scale=generation.guidance_scale, max_sequence_length=generation.max_sequence_length,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    passed = [shapes.check(np.asarray(i), p.meaning) for i, p in zip(images, chosen, strict=True)]
    wrong = [shapes.check(np.asarray(i), p.meaning) for i, p in zip(images, chosen[1:] + chosen[:1], strict=True)]
    assert np.mean(passed) >= 0.3 > np.mean(wrong)


def test_card_says_how_and_what() -> None:
    card = (Path(BUILTIN) / "README.md").read_text()
    assert "edgeprune.demo.train" in card and all(task in card for task in shapes.TASKS)


def test_the_tokenizer_is_the_same_from_run_to_run(tmp_path: Path) -> None:
    """Resuming a checkpoint with other token numbers would scramble the text encoders."""
    from edgeprune.demo.train.words import clip_tokenizer

    first, second = (clip_tokenizer(tmp_path / name, shapes.PLAIN.grammar, 16) for name in "ab")
    assert first.get_vocab() == second.get_vocab()
    assert all(len(first.tokenize(word)) == 1 for word in ("purple", "x", "9", "rings"))
