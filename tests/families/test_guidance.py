"""Guidance: which scale acts, what is said of one that does not, and of one that a model was not compressed for."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
from fakes import FakeBackend, fake_runtime

from edgeprune.families import family_of
from edgeprune.runtimes import base
from edgeprune.sampling.generation import Generation, heed
from edgeprune.sampling.scheduler import FlowMatch

KLEIN: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel", "in_channels": 128, "joint_attention_dim": 64, "guidance_embeds": False,
}  # fmt: skip


def folder_of(path: Path, config: dict[str, Any], **index: Any) -> Path:
    """Write the small files of a pipeline."""
    files: dict[str, dict[str, Any]] = {
        "model_index.json": index,
        "transformer/config.json": config,
        "vae/config.json": {"block_out_channels": [8, 8, 8, 8]},
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("config", "index", "steps", "scale"),
    [
        (KLEIN, {"is_distilled": False}, 50, 4.0),
        (KLEIN, {}, 50, 4.0),  # as Flux2KleinPipeline
        (KLEIN, {"is_distilled": True}, 4, 1.0),
        (KLEIN | {"guidance_embeds": True}, {"is_distilled": True}, 50, 4.0),
    ],
)
def test_flux_2_is_sampled_as_its_pipeline_does(
    tmp_path: Path, config: dict[str, Any], index: dict[str, Any], steps: int, scale: float
) -> None:
    found = Generation.load(folder_of(tmp_path, config, **index))
    assert (found.num_inference_steps, found.guidance_scale) == (steps, scale)


def test_a_distilled_model_is_never_guided(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, KLEIN, is_distilled=True)
    with pytest.warns(UserWarning, match="guidance scale 4 is ignored: model_index.json says is_distilled"):
        assert heed(folder, {"guidance_scale": 4.0, "height": 64}) == {"guidance_scale": 1.0, "height": 64}
    (folder / "generation.json").write_text('{"guidance_scale": 4.0}')
    assert Generation.load(folder).guidance_scale == 1.0
    settings = base.read_settings(folder)
    with pytest.warns(UserWarning, match="is ignored"):
        assert settings.scale(4.0) == 1.0
    assert not settings.family.guided(settings.config, settings.scale(None))


@pytest.mark.parametrize(
    ("kind", "scale", "words"),
    [
        ("sd3", 0.0, ""), ("sd3", 0.5, "no effect"), ("sd3", 1.0, ""), ("sd3", 7.0, ""),
        ("flux", 0.5, ""), ("flux", 3.5, ""),
        ("flux-schnell", 0.0, ""), ("flux-schnell", 0.5, "no effect"), ("flux-schnell", 3.5, "takes none"),
        ("flux2", 0.5, "no effect"), ("flux2", 4.0, ""), ("flux2-dev", 0.5, ""), ("flux2-dev", 4.0, ""),
    ],
)  # fmt: skip
def test_what_is_said_of_a_scale(tmp_path: Path, kind: str, scale: float, words: str) -> None:
    folder = folder_of(tmp_path, tiny.config_of(tiny.KINDS[kind]()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert heed(folder, {"guidance_scale": scale}) == {"guidance_scale": scale}
    assert [words in str(w.message) for w in said] == ([True] if words else [])


@pytest.mark.parametrize("file", ["edgeprune.json", "edgeprune_export.json"])
def test_a_scale_that_the_model_was_not_compressed_for(tmp_path: Path, file: str) -> None:
    folder = folder_of(tmp_path, tiny.config_of(tiny.tiny_flux()))
    (folder / "generation.json").write_text('{"guidance_scale": 3.5, "height": 64, "width": 64}')
    assert base.read_settings(folder).scale(7.0) == 7.0  # the original knows all scales
    (folder / file).write_text('{"compressed": true}')
    settings = base.read_settings(folder)
    assert settings.scale(None) == settings.scale(3.5) == 3.5
    with pytest.warns(UserWarning, match=r"guidance scale 7: the model was compressed for 3\.5"):
        assert settings.scale(7.0) == 7.0


def test_every_runtime_says_it() -> None:
    model = fake_runtime()
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 16, "guidance_embeds": True}
    settings = dataclasses.replace(model.settings, family=family_of(config), config=config, compressed=True)
    dev = base.Runtime(FakeBackend(), settings, FlowMatch())
    dev.generate_latents("a")
    with pytest.warns(UserWarning, match="compressed for 2"):
        dev.generate_latents("a", guidance_scale=7.0)
    with pytest.warns(UserWarning, match="no effect"):
        model.generate_latents("a", guidance_scale=0.5)
