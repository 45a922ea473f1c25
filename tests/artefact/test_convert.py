"""A single file becomes the diffusers folder that it was made from, whatever its layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import singles
import tiny
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file

from edgeprune import api
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.convert.layouts import ldm_name
from edgeprune.common import linking
from edgeprune.common.errors import InputError
from edgeprune.families.encoders import text_encoders
from edgeprune.families.parts import tensor_of
from edgeprune.sampling.denoising import Conditioning, velocity

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PIPELINES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "flux": (tiny.tiny_flux_pipeline, {}),
    "schnell": (tiny.tiny_flux_pipeline, {"guidance_embeds": False}),
    "sd3": (tiny.tiny_pipeline, {"qk_norm": None}),
    "sd35": (tiny.tiny_pipeline, {"t5": True}),
    "sd35-medium": (tiny.tiny_pipeline, {"t5": True, "dual_attention_layers": (0, 1)}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind; its model index is a card, too."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, (make, options) in PIPELINES.items():
        make(root / name, **options)
        (root / name / "LICENSE").write_text("Do as you like.\n")
        (root / name / "README.md").write_text("---\nlicense: mit\n---\n")
    return {name: root / name for name in PIPELINES}


def is_sd3(name: str) -> bool:
    return name.startswith("sd3")


def same(one: Path, other: Path) -> None:
    """Compare all tensors of two pipelines, and the names of all parts."""
    assert one.is_dir() and other.is_dir()
    networks = {"transformer": "", "vae": "", **text_encoders(one)}
    assert text_encoders(one) == text_encoders(other)
    for part, kind in networks.items():
        a, b = (singles.weights(folder / part) for folder in (one, other))
        a, b = ({tensor_of(kind, n): t for n, t in tensors.items()} for tensors in (a, b))
        assert a.keys() == b.keys(), part
        assert all(torch.equal(a[n], b[n]) for n in a), part


def transformer_of(folder: Path) -> torch.nn.Module:
    index = json.loads((folder / "transformer/config.json").read_text())
    kind = {"F": FluxTransformer2DModel, "S": SD3Transformer2DModel}[index["_class_name"][0]]
    return kind.from_pretrained(folder / "transformer").float().eval()


def velocity_of(folder: Path) -> torch.Tensor:
    """Evaluate a folder's transformer once, as diffusers loads it."""
    model: Any = transformer_of(folder)
    seeded = torch.Generator().manual_seed(1)
    text = torch.randn(2, 16, model.config.joint_attention_dim, generator=seeded)
    condition = Conditioning(text, torch.randn(2, model.config.pooled_projection_dim, generator=seeded))
    with torch.no_grad():
        return velocity(model, torch.randn(2, 8, 8, 8, generator=seeded), condition, torch.tensor([0.2, 0.7]), 3.0)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_transformer_in_the_layout_of_its_authors(
    name: str, prefix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    state = singles.original(singles.weights(folders[name] / "transformer"), sd3=is_sd3(name))
    file = singles.save({f"{prefix}{n}": t for n, t in state.items()}, tmp_path / "x.safetensors")
    done = api.convert(file, tmp_path / "out", config=folders[name])
    assert done.converted == ("transformer",) and done.tensors == len(state) and not done.unneeded
    same(folders[name], tmp_path / "out")
    check_pipeline(tmp_path / "out")
    assert torch.equal(velocity_of(folders[name]), velocity_of(tmp_path / "out"))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_whole_checkpoint(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = singles.all_in_one(folders[name])
    tensors["model_ema.decay"] = torch.zeros(())
    file = singles.save(tensors, tmp_path / "x.safetensors")
    # What the file has is not taken from the config folder, which here has no weights.
    config = Path(shutil.copytree(folders[name], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))
    done = api.convert(file, tmp_path / "out", config=config)
    assert {"transformer", "vae", *text_encoders(config)} == set(done.converted)
    assert {"scheduler", "tokenizer", "tokenizer_2"} <= set(done.copied)
    assert done.unneeded["training states"] == 1
    same(folders[name], tmp_path / "out")
    for small in ("LICENSE", "README.md", "generation.json"):
        assert (tmp_path / "out" / small).read_bytes() == (config / small).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["flux", "sd35-medium"])
def test_a_file_and_a_folder_in_diffusers_layout(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders[name] / "transformer"
    api.convert(source / "diffusion_pytorch_model.safetensors", tmp_path / "one", config=folders[name])
    api.convert(source, tmp_path / "two", config=folders[name])
    same(folders[name], tmp_path / "one")
    same(folders[name], tmp_path / "two")


def test_shards_are_read_and_written(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.residency import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    file = singles.save(singles.all_in_one(folders["sd35"]), tmp_path / "x.safetensors")
    api.convert(file, tmp_path / "out", config=folders["sd35"])
    assert len(list((tmp_path / "out/transformer").glob("*-of-*.safetensors"))) > 3
    assert (tmp_path / "out/text_encoder_3/model.safetensors.index.json").is_file()
    same(folders["sd35"], tmp_path / "out")
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained(tmp_path / "out/text_encoder_3")
    api.convert(tmp_path / "out/transformer", tmp_path / "again", config=folders["sd35"])
    same(folders["sd35"], tmp_path / "again")


def test_the_vae_lies_as_in_diffusers_conversion(folders: dict[str, Path]) -> None:
    state = singles.weights(folders["flux"] / "vae")
    config = json.loads((folders["flux"] / "vae/config.json").read_text())
    ldm = singles.ldm_vae(state)
    theirs = convert_ldm_vae_checkpoint({f"first_stage_model.{n}": t for n, t in ldm.items()}, config)
    ours = {ldm_name(n, len(config["block_out_channels"])): t for n, t in ldm.items()}
    assert theirs.keys() == ours.keys() == state.keys()
    assert all(torch.equal(theirs[n].flatten(), ours[n].flatten()) for n in theirs)


def test_a_converted_model_shares_no_file_with_the_config_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People train and save originals in place, which a hard link would pass on."""
    monkeypatch.setattr(linking, "LINKED_FROM", 0)
    config = folders["schnell"]
    api.convert(config / "transformer", tmp_path / "out", config=config)
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 for path in made)
    same(config, tmp_path / "out")


def test_names_are_kept_for_guesses(folders: dict[str, Path], tmp_path: Path) -> None:
    """A file's name may say that its model takes few steps; nothing else does."""
    from edgeprune.sampling.generation import hints_of

    state = singles.original(singles.weights(folders["sd35"] / "transformer"), sd3=True)
    file = singles.save(state, tmp_path / "sd3.5-turbo-8steps.safetensors")
    api.convert(file, tmp_path / "out", config=folders["sd35"])
    assert hints_of(tmp_path / "out").few_steps == 8


def test_a_dry_run_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    file = singles.save(singles.all_in_one(folders["flux"]), tmp_path / "x.safetensors")
    expected = api.forecast_convert(file, tmp_path / "out", config=folders["flux"])
    assert not (tmp_path / "out").exists()
    assert expected == api.convert(file, tmp_path / "out", config=folders["flux"])
    written = sum(t.nbytes for p in expected.converted for t in singles.weights(tmp_path / "out" / p).values())
    assert written == expected.converted_bytes


def test_an_output_that_exists_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    state = singles.original(singles.weights(folders["flux"] / "transformer"), sd3=False)
    file = singles.save(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="-o .*out: exists already; remove it, or use another -o"):
        api.convert(file, tmp_path / "out", config=folders["flux"])
    assert (tmp_path / "out/mine").read_text() == "x"


def test_tensors_that_are_there_twice_have_to_be_equal(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = singles.all_in_one(folders["sd35"])
    shared = tensors["text_encoders.t5xxl.transformer.shared.weight"]
    tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = shared.clone()
    api.convert(singles.save(tensors, tmp_path / "a.safetensors"), tmp_path / "out", config=folders["sd35"])
    tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = shared + 1
    with pytest.raises(InputError, match="found other numbers than in text_encoders.t5xxl"):
        api.convert(singles.save(tensors, tmp_path / "b.safetensors"), tmp_path / "b", config=folders["sd35"])
    assert not list(tmp_path.glob("b*partial")) and not (tmp_path / "b").exists()
    assert load_file(tmp_path / "out/text_encoder_3/model.safetensors")["shared.weight"].equal(shared)
