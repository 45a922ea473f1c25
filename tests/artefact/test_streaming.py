"""Models larger than memory: shards are read, written and resumed, one block is in memory, files run in slices."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed

from edgeprune.artefact import synth
from edgeprune.artefact.loading import load_transformer, open_transformer
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.files import sha256_file
from edgeprune.export import modules, parity, to_onnx
from edgeprune.export.chunked_onnx import ChunkedOnnx
from edgeprune.export.to_onnx import sources
from edgeprune.families import family_of
from edgeprune.families.positions import SeparatePatchEmbed, separate
from edgeprune.planning.options import PlanOptions
from edgeprune.residency import shards
from edgeprune.residency.shards import ShardWriter
from edgeprune.residency.weights import INDEX, Weights
from edgeprune.sampling.generation import Generation
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace

SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 1, "in_channels": 8, "out_channels": 8,
    "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
    "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 32, "num_layers": 2,
    "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
    "pooled_projection_dim": 64, "guidance_embeds": False, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("config", [SD3, FLUX], ids=["sd3", "flux"])


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every block its own shard."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)


def made(folder: Path, config: dict[str, Any] = SD3) -> Path:
    """Write a tiny pipeline with one shard per block."""
    synth.write_pipeline(config, folder, label="tiny")
    Generation(num_inference_steps=2, guidance_scale=0.0, height=64, width=64, max_sequence_length=8).save(folder)
    return folder


def planned(folder: Path, source: Path, blocks: str = "1") -> Workspace:
    """Return a workspace whose plan removes these blocks."""
    ws = Workspace(folder, str(source))
    run_plan(ws, PlanOptions(method="manual", blocks=blocks))
    return ws


# ------------------------------------------------------------------------------------- reading


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    folder = made(tmp_path / "m") / "transformer"
    assert len(list(folder.glob("*.safetensors"))) == 5
    found = Weights(folder)
    assert found.shapes == family_of(SD3).tensor_shapes(SD3)
    stock = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in stock.items())
    with pytest.raises(InputError, match=r"norm_out\.nothing: found no such tensor"):
        found["norm_out.nothing"]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "m") / "transformer"
    index, shard = folder / INDEX, folder / "diffusion_pytorch_model-00002-of-00005.safetensors"
    right, whole = json.loads(index.read_text()), shard.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            Weights(folder).check(family_of(SD3).tensor_shapes(SD3))

    shard.write_bytes(whole[: len(whole) // 2])
    refused(r"00002-of-00005\.safetensors: not whole safetensors")
    shard.unlink()
    refused(r"00002-of-00005\.safetensors: no such file")
    shard.write_bytes(whole)
    name = next(n for n, file in right["weight_map"].items() if file == shard.name)
    for file, match in (
        ("../../elsewhere.safetensors", r"found '\.\./\.\./elsewhere\.safetensors', expected the name of a"),
        ("model.bin", "expected the name of a .safetensors file beside it"),
        ("diffusion_pytorch_model-00001-of-00005.safetensors", "expected 'diffusion_pytorch_model-00002"),
    ):
        index.write_text(json.dumps({"weight_map": right["weight_map"] | {name: file}}))
        refused(match)
    index.write_text(json.dumps({"weight_map": right["weight_map"] | {"x": shard.name}}))
    refused("'x': found no such tensor in")
    index.write_text(json.dumps({"weight_map": 5}))
    refused("weight_map: found int")
    del right["weight_map"][name]
    index.write_text(json.dumps(right))
    refused("found None, expected 'diffusion_pytorch_model-00002")
    index.unlink()
    refused(r"found diffusion_pytorch_model-00001-of-00005\.safetensors, expected")


# ------------------------------------------------------------------------------------- writing


def test_a_killed_writer_goes_on(tmp_path: Path) -> None:
    groups = [["a"], ["b"], ["c"]]
    first = ShardWriter(tmp_path / "t", groups, "1")
    first.put(0, {"a": torch.zeros(2)})
    again = ShardWriter(tmp_path / "t", groups, "1")
    assert [again.has(i) for i in range(3)] == [True, False, False]
    assert not ShardWriter(tmp_path / "t", groups, "2").has(0)  # made from something else


@pytest.mark.parametrize("config", [SD3, pytest.param(FLUX, marks=pytest.mark.slow)], ids=["sd3", "flux"])
def test_prune_and_quantise_resume_to_the_same_bytes(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "source", config)
    whole = planned(tmp_path / "whole", source)
    run_prune(whole)
    run_quantize(whole, QuantizeOptions())
    killed = planned(tmp_path / "killed", source)
    written: list[int] = []
    put = ShardWriter.put

    def full(self: ShardWriter, index: int, tensors: Any) -> None:
        if len(written) == 2:
            raise EdgepruneError("disk full")
        written.append(index)
        put(self, index, tensors)

    for stage in (run_prune, lambda ws: run_quantize(ws, QuantizeOptions())):
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "put", full)
            with pytest.raises(EdgepruneError, match="disk full"):
                stage(killed)
        assert written == [0, 1]
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "put", lambda s, i, t: written.append(i) or put(s, i, t))
            assert stage(killed)
        assert written == [2, 3]  # nothing is made twice
        written.clear()
    assert whole.manifest.files == killed.manifest.files
    loaded = load_transformer(whole.out, quantized=True)
    assert len(family_of(config).blocks(loaded)) == 3


def test_calibrated_resume_sees_the_blocks_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "source")
    options, hashes = QuantizeOptions(calibration="feedback"), []
    for name, kill in (("whole", False), ("killed", True)):
        ws = planned(tmp_path / name, source)
        run_prune(ws)
        if kill:
            put = ShardWriter.put

            def stop(self: ShardWriter, index: int, tensors: Any, put: Any = put) -> None:
                if index == 1:
                    raise KeyboardInterrupt
                put(self, index, tensors)

            with monkeypatch.context() as patch:
                patch.setattr(ShardWriter, "put", stop)
                with pytest.raises(KeyboardInterrupt):
                    run_quantize(ws, options)
        run_quantize(ws, options)
        hashes.append([sha256_file(p) for p in sorted((ws.out / "transformer_int4").glob("*.safetensors"))])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4


def test_a_short_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    for tiny_encoders, size in ((False, "27.6"), (True, "16.3")):
        with pytest.raises(EdgepruneError, match=rf"needs {size} GB, the disk has 0\.0 GB left"):
            synth.synth("sd3.5-large", tmp_path / size, tiny_encoders=tiny_encoders)
        assert not list((tmp_path / size).rglob("*.tmp/*.safetensors"))


# ------------------------------------------------------------------------------------- running


@FAMILIES
def test_a_running_model_holds_one_block(config: dict[str, Any], tmp_path: Path) -> None:
    stored = open_transformer(made(tmp_path / "m", config), quantized=False)
    model, whole = stored.running(), load_transformer(tmp_path / "m", quantized=False)
    held: list[int] = []
    blocks = stored.family.blocks(model)
    for block in blocks:
        block.register_forward_hook(
            lambda *_: held.append(sum(next(b.parameters()).device.type == "cpu" for b in blocks)), prepend=True
        )
    example = modules.Transformer(whole).example(batch=2, height=4, width=6, tokens=5)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(
                modules.Transformer(model)(*example.values())[0], modules.Transformer(whole)(*example.values())[0]
            )
    assert held == [1] * 8


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD3, FLUX], ids=["sd3", "flux"])
def test_slices_compute_what_the_file_computes(config: dict[str, Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "m", config | {"num_layers": 2})
    part = next(iter(sources(folder)))
    path = tmp_path / "model.onnx"
    to_onnx.save("transformer", part.to_ir(), path)
    feeds = {name: tensor.numpy() for name, tensor in part.examples[1].items()}
    sliced = ChunkedOnnx(path, parity._session, limit=40_000)
    assert len(sliced.chunks) > 5
    (whole,), (found,) = (p.run(None, feeds) for p in (parity.session(path), sliced))
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == ["model.onnx"]


def test_sines_are_held_as_rows_and_columns() -> None:
    embed = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=12)
    found = separate(embed.pos_embed)
    assert found is not None and {t.shape for t in found.values()} == {(12, 16)}
    latent = torch.randn(2, 4, 10, 14)
    torch.testing.assert_close(SeparatePatchEmbed(embed, **found)(latent), embed(latent))
    assert separate(torch.randn(1, 144, 32)) is None


def test_a_table_that_was_trained_is_kept(tmp_path: Path) -> None:
    model = tiny.tiny_transformer()
    with torch.no_grad():
        model.pos_embed.pos_embed += torch.randn_like(model.pos_embed.pos_embed)
    stored = tiny.stored(model)
    assert stored.family.compact(stored.traceable(), stored.read) == {}


# ------------------------------------------------------------------------------------- synth


def test_synth_is_the_same_again_and_refuses_another(tmp_path: Path) -> None:
    folder = made(tmp_path / "m")
    before = {p.name: sha256_file(p) for p in (folder / "transformer").iterdir()}
    shutil.rmtree(folder / "transformer")
    made(folder)
    assert before == {p.name: sha256_file(p) for p in (folder / "transformer").iterdir()}
    with pytest.raises(InputError, match="another architecture"):
        made(folder, FLUX)
    with pytest.raises(InputError, match="expected one of"):
        synth.synth("sd5", tmp_path / "n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(InputError, match="not made by synth"):
        made(tmp_path / "mine")
