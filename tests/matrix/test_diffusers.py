"""Compressed folders in stock diffusers and by `edgeprune.load`, on whichever versions are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from drawing import drawn, ours

import edgeprune

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # vendors' deprecations


def test_stock_diffusers_runs_a_whole_block_plan(whole_block: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(whole_block, text_encoder_3=None, tokenizer_3=None)
    assert type(pipe.transformer) is SD3Transformer2DModel
    image, reference = drawn(pipe, whole_block), ours(whole_block, "eager")
    assert reference.std() > 5 and np.abs(image - reference).max() <= 1


def test_edgeprune_load_runs_a_component_plan(component_wise: Path, exported: Path) -> None:
    """Against the ONNX export in ONNX Runtime, which shares nothing with diffusers but the integers."""
    image, reference = drawn(edgeprune.load(component_wise), component_wise), ours(exported, "ort")
    assert reference.std() > 5 and np.abs(image - reference).max() <= 1


def test_stock_diffusers_refuses_a_component_plan(component_wise: Path) -> None:
    """It would fill what was removed with random weights, and only warn. Its error says how to load the folder."""
    for load in (
        lambda: StableDiffusion3Pipeline.from_pretrained(component_wise, text_encoder_3=None, tokenizer_3=None),
        lambda: DiffusionPipeline.from_pretrained(component_wise),
        lambda: SD3Transformer2DModel.from_pretrained(component_wise / "transformer"),
    ):
        with pytest.raises(ValueError, match=r"got edgeprune: .*edgeprune\.load\(folder\)"):
            load()
