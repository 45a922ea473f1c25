"""Weights in 8 bits and fewer: converted values are those that their own programs compute, in bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import singles
import tiny
import torch
from safetensors.torch import load_file, save_file

from edgeprune import api
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.convert.gguf_file import TYPES, Gguf
from edgeprune.artefact.convert.safetensors import Safetensors
from edgeprune.common.errors import InputError

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "model"
    tiny.tiny_flux_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "model"
    tiny.tiny_pipeline(folder, t5=True, dual_attention_layers=(0,))
    return folder


def transformer(folder: Path) -> singles.Tensors:
    return singles.original(singles.weights(folder / "transformer"), sd3="sd3" in str(folder))


def converted(folder: Path) -> singles.Tensors:
    """Return a converted folder's transformer in the layout of its authors."""
    return transformer(folder)


def equal(found: singles.Tensors, expected: singles.Tensors) -> None:
    assert found.keys() == expected.keys()
    different = [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert not different, different[:3]


@pytest.mark.parametrize("kind", FLOAT8)
def test_plain_float8(kind: torch.dtype, flux: Path, tmp_path: Path) -> None:
    state = {n: t.to(kind) if t.ndim == 2 else t for n, t in transformer(flux).items()}
    file = singles.save(state, tmp_path / "flux.safetensors")
    done = api.convert(file, tmp_path / "flux-out", config=flux)
    equal(converted(tmp_path / "flux-out"), {n: t.to(torch.bfloat16) if t.ndim == 2 else t for n, t in state.items()})
    assert done.widened == ({FLOAT8[0]: "F8_E4M3", FLOAT8[1]: "F8_E5M2"}[kind],)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_scaled_float8(name: str, new: bool, rows: bool, flux: Path, sd3: Path, tmp_path: Path) -> None:
    folder = {"flux": flux, "sd3": sd3}[name]
    state = singles.scaled_fp8(transformer(folder), new=new, rows=rows)
    file = singles.save({f"model.diffusion_model.{n}": t for n, t in state.items()}, tmp_path / "x.safetensors")
    done = api.convert(file, tmp_path / f"{name}-out", config=folder)
    equal(converted(tmp_path / f"{name}-out"), singles.unscaled(state))
    layers = sum(t.dtype == torch.float8_e4m3fn and t.ndim == 2 for t in state.values())
    markers = layers if new else 1
    assert done.unneeded == {"scales of weights": layers, "scales of inputs": layers, "markers of float8": markers}
    assert done.tensors == len(state)


def test_values_are_close_to_the_original(flux: Path, tmp_path: Path) -> None:
    """A wrong scale would be far off; this does not depend on the helper that computes expected values."""
    state = transformer(flux)
    file = singles.save(singles.scaled_fp8(state), tmp_path / "x.safetensors")
    api.convert(file, tmp_path / "flux-out", config=flux)
    found = converted(tmp_path / "flux-out")
    for name, tensor in state.items():
        assert (found[name].float() - tensor.float()).norm() <= 0.04 * tensor.float().norm(), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16", "F32"])
def test_gguf(kind: str, flux: Path, tmp_path: Path) -> None:
    expected = singles.write_gguf(transformer(flux), tmp_path / "flux.gguf", kind)
    api.convert(tmp_path / "flux.gguf", tmp_path / "flux-out", config=flux)
    found = converted(tmp_path / "flux-out")
    own = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(kind, torch.bfloat16)
    equal(found, {n: t.to(own if t.ndim > 1 else torch.float32) for n, t in expected.items()})


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL"])
def test_gguf_in_large_blocks(kind: str, sd3: Path, tmp_path: Path) -> None:
    """Rows of 64 are no whole blocks of 256: ComfyUI-GGUF reshapes these tensors and keeps their shape in a field."""
    state = {f"model.diffusion_model.{n}": t for n, t in transformer(sd3).items()}
    expected = singles.write_gguf(state, tmp_path / "x.gguf", kind, architecture="sd3")
    reshaped = [n for n in Gguf(tmp_path / "x.gguf").fields if n.startswith("comfy.gguf.orig_shape.")]
    assert kind == "IQ4_NL" or len(reshaped) > 10
    api.convert(tmp_path / "x.gguf", tmp_path / "sd3-out", config=sd3)
    found = {f"model.diffusion_model.{n}": t for n, t in converted(tmp_path / "sd3-out").items()}
    equal(found, {n: t.to(found[n].dtype) for n, t in expected.items()})
    assert sum(t.dtype == torch.bfloat16 for t in found.values()) > 30


def test_a_table_without_its_first_axis(sd3: Path, tmp_path: Path) -> None:
    """GGUF's own writers drop axes of length one."""
    state = transformer(sd3)
    state["pos_embed"] = state["pos_embed"][0]
    singles.write_gguf(state, tmp_path / "x.gguf", "F16", architecture="sd3")
    api.convert(tmp_path / "x.gguf", tmp_path / "sd3-out", config=sd3)
    assert converted(tmp_path / "sd3-out")["pos_embed"].shape[0] == 1


def test_sizes_of_types_are_the_packages() -> None:
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_rows_are_the_rows_of_the_whole(flux: Path, tmp_path: Path) -> None:
    state = transformer(flux)
    singles.write_gguf(state, tmp_path / "x.gguf", "Q8_0")
    files = [Gguf(tmp_path / "x.gguf")]
    for rows in (False, True):
        file = singles.save(singles.scaled_fp8(state, rows=rows), tmp_path / f"{rows}.safetensors")
        files.append(Safetensors([file]))  # type: ignore[arg-type]
    for stored in files:
        for name in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight"):
            assert torch.equal(stored.read(name, (7, 100)), stored.read(name)[7:100])


def test_a_pipeline_with_parts_in_float8(sd3: Path, tmp_path: Path) -> None:
    """The folder itself is given: transformer plain, T5 with scales; all else is copied."""
    folder = Path(shutil.copytree(sd3, tmp_path / "fp8"))
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    plain = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(path).items()}
    save_file(plain, path, {"format": "pt"})
    path = folder / "text_encoder_3/model.safetensors"
    # Copies: the tensors of a file are mapped, and the file is written again.
    scaled = singles.scaled_fp8({n: t.clone() for n, t in load_file(path).items()})
    save_file({n: t.contiguous() for n, t in scaled.items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"found F8_E4M3, .*edgeprune convert {folder} -o {folder}-bf16"):
        check_pipeline(folder)
    done = api.convert(folder, tmp_path / "out")
    assert done.converted == ("transformer", "text_encoder_3")
    equal(singles.weights(tmp_path / "out/transformer"), {n: t.to(torch.bfloat16) for n, t in plain.items()})
    equal(singles.weights(tmp_path / "out/text_encoder_3"), singles.unscaled(scaled))
    equal(singles.weights(tmp_path / "out/vae"), singles.weights(sd3 / "vae"))
    with pytest.raises(InputError, match="a diffusers folder in 16 or 32 bits already; run: edgeprune compress"):
        api.convert(tmp_path / "out", tmp_path / "again")


NVFP4 = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
REFUSED = {
    "nf4": ({"double_blocks.0.img_attn.qkv.weight.absmax": torch.ones(3)}, "quantised by bitsandbytes"),
    "int8": ({"double_blocks.0.img_attn.qkv.SCB": torch.ones(3)}, "quantised by bitsandbytes"),
    "gptq": ({"double_blocks.0.img_attn.qkv.qweight": torch.ones(3, dtype=torch.int32)}, "quantised by GPTQ or AWQ"),
    "svdquant": ({"transformer_blocks.0.qkv_proj.wscales": torch.ones(3)}, "quantised by SVDQuant"),
    "quanto": ({"transformer_blocks.0.attn.to_q.weight._data": torch.ones(3)}, "quantised by quanto"),
    "torchao": ({"transformer_blocks.0.attn.to_q._weight_qdata": torch.ones(3)}, "quantised by torchao"),
    "nvfp4": ({"double_blocks.0.img_mlp.0.weight_scale_2": torch.ones(())}, "quantised by NVFP4"),
    "int8-weight": (
        {"double_blocks.0.img_mlp.0.weight": torch.ones(3, 3, dtype=torch.int8)}, "found I8, expected F64, F32",
    ),
    "format": (
        {"double_blocks.0.img_mlp.0.comfy_quant": NVFP4},
        "found weights in the format 'nvfp4', expected float8",
    ),
    "block-scales": (
        {"double_blocks.0.img_mlp.0.scale_weight": torch.ones(2, 2)}, r"found F32 \(2, 2\), expected one number",
    ),
    "no-scale": ({"double_blocks.0.img_mlp.0.scale_weight": None}, "found no scale_weight, expected one"),
    "scale-of-nothing": ({"double_blocks.9.img_mlp.0.scale_weight": torch.ones(())}, "found a scale of no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_quantisations_are_named(name: str, flux: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    state = singles.scaled_fp8(transformer(flux)) | changes
    file = singles.save({n: t for n, t in state.items() if t is not None}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        api.convert(file, tmp_path / "out", config=flux)
    assert not (tmp_path / "out").exists()


def test_the_files_own_description_is_read(flux: Path, tmp_path: Path) -> None:
    note = json.dumps({"layers": {"double_blocks.0.img_mlp.0": {"format": "int8_tensorwise"}}})
    file = singles.save(transformer(flux), tmp_path / "x.safetensors", _quantization_metadata=note)
    with pytest.raises(InputError, match="found weights in the format 'int8_tensorwise'"):
        api.convert(file, tmp_path / "out", config=flux)
