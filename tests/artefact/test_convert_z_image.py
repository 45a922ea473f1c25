"""A single file of Z-Image becomes the diffusers folder that it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import singles
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from edgeprune import api
from edgeprune.artefact.checks import check_pipeline
from edgeprune.common.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PARTS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("convert") / "z-image"
    with tiny.shallow_z_image():
        tiny.tiny_z_image_pipeline(folder, layers=2, n_layers=2)
        yield folder


def same(one: Path, other: Path, parts: tuple[str, ...] = PARTS) -> None:
    for part in parts:
        a, b = (singles.weights(folder / part) for folder in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_the_layout_of_its_authors(source: Path, tmp_path: Path, prefix: str) -> None:
    """As diffusers itself converts it; pad tokens lie outside of layers, and a norm that nothing reads is left out."""
    weights = singles.weights(source / "transformer")
    state = {f"{prefix}{name}": tensor for name, tensor in singles.z_image(weights).items()}
    done = api.convert(singles.save(state, tmp_path / "x.safetensors"), tmp_path / "out", config=source)
    assert done.converted == ("transformer",) and done.unneeded == {"not part of transformer": 1}
    same(source, tmp_path / "out")
    check_pipeline(tmp_path / "out")
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(state)
    assert theirs.keys() == weights.keys() and all(torch.equal(theirs[name], weights[name]) for name in theirs)


def test_a_transformer_in_the_layout_of_diffusers(source: Path, tmp_path: Path) -> None:
    api.convert(source / "transformer", tmp_path / "out", config=source)
    same(source, tmp_path / "out")


def test_a_whole_checkpoint(source: Path, tmp_path: Path) -> None:
    """What the file has is not taken from the config folder, which here has no weights."""
    state = {
        f"model.diffusion_model.{n}": t for n, t in singles.z_image(singles.weights(source / "transformer")).items()
    }
    state |= {f"vae.{n}": t for n, t in singles.ldm_vae(singles.weights(source / "vae")).items()}
    encoder = singles.weights(source / "text_encoder")
    state |= {f"text_encoders.qwen3_4b.transformer.{n}": t for n, t in encoder.items()}
    state["text_encoders.qwen3_4b.logit_scale"] = torch.tensor(4.6)
    config = Path(shutil.copytree(source, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))
    done = api.convert(singles.save(state, tmp_path / "x.safetensors"), tmp_path / "out", config=config)
    assert set(done.converted) == set(PARTS)
    same(source, tmp_path / "out")
    check_pipeline(tmp_path / "out")


def test_what_does_not_fit_is_named(source: Path, tmp_path: Path) -> None:
    state = singles.z_image(singles.weights(source / "transformer"))
    file = singles.save({n: t for n, t in state.items() if n != "cap_pad_token"}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="cap_pad_token: found no such tensor"):
        api.convert(file, tmp_path / "out", config=source)
    file = singles.save(state | {"layers.2.ffn_norm1.weight": torch.ones(64)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="n_layers: found 2, but .* is a transformer of Z-Image of 3 blocks, 64 wide"):
        api.convert(file, tmp_path / "out", config=source)
