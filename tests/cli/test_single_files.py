"""Files that are no diffusers folder: every command says what they are, and what to do, in one line."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import singles
import torch
from typer.testing import CliRunner

from edgeprune.artefact.convert.opening import open_file
from edgeprune.cli import app
from edgeprune.common.errors import EdgepruneError, InputError

COMMANDS = {
    "compress": "compress {file} -o {out}",
    "compress --dry-run": "compress {file} -o {out} --dry-run",
    "analyze": "analyze {file} -o {out}",
    "cache": "cache captions --model {file} -o {out}",
    "compare": "compare {file} -o {out} --dry-run --data captions",
    "export": "export {file} --target onnx -o {out}",
    "generate": "generate x --model {file} -o {out}.png",
    "score": "score {file} --metric shapes",
    "convert": "convert {file} -o {out}",
}
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072), "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
    "single_blocks.0.linear1.weight": (4, 4), "single_blocks.37.linear1.weight": (4, 4),
    "img_in.weight": (3072, 64), "guidance_in.in_layer.weight": (3072, 256),
}  # fmt: skip
SD35 = {
    "joint_blocks.0.x_block.attn.ln_q.weight": (64,), "joint_blocks.37.x_block.attn.ln_q.weight": (64,),
    "x_embedder.proj.weight": (2432, 16, 2, 2), "pos_embed": (1, 36864, 2432),
}  # fmt: skip
Z_IMAGE = {
    "layers.0.adaLN_modulation.0.weight": (15360, 256), "layers.29.adaLN_modulation.0.weight": (15360, 256),
    "noise_refiner.1.attention_norm1.weight": (3840,), "x_embedder.weight": (3840, 64),
}  # fmt: skip
UNET = {"model.diffusion_model.input_blocks.0.0.weight": (4,)}
OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "lora": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4,)}, "a LoRA; .*edgeprune lora .*--model"),
    "controlnet": ({"controlnet_blocks.0.weight": (4,), "double_blocks.0.img_attn.qkv.weight": (4,)}, "a ControlNet"),
    "redux": ({"redux_up.weight": (4,)}, "an image adapter"),
    "vae": ({"decoder.up.0.block.0.conv1.weight": (4,)}, "a VAE; it is one part of a model"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4,)}, "a T5 text encoder; it is one part of a model"),
    "clip": ({"text_model.encoder.layers.0.mlp.fc1.weight": (4,)}, "a CLIP text encoder; it is one part"),
    "llm": ({"model.layers.0.self_attn.q_proj.weight": (4,)}, "a language model"),
    "sd15": (UNET, "Stable Diffusion 1 or 2; edgeprune compresses SD3, SD3.5, FLUX and Z-Image"),
    "sdxl": (UNET | {"model.diffusion_model.label_emb.0.0.weight": (4,)}, "Stable Diffusion XL"),
    "chroma": (FLUX | {"distilled_guidance_layer.layers.0.in_layer.weight": (4,)}, "Chroma; edgeprune compresses"),
    "flux2": ({"double_stream_modulation_img.lin.weight": (4,)}, "FLUX.2; single files of it are not read"),
    "qwen": ({"transformer_blocks.0.img_mod.1.weight": (4,)}, "Qwen-Image; edgeprune compresses"),
    "lumina": ({"layers.0.adaLN_modulation.1.weight": (4,), "noise_refiner.0.w": (4,)}, "Lumina; edgeprune compresses"),
    "omni": (Z_IMAGE | {"siglip_embedder.1.weight": (4,)}, "Z-Image-Omni; edgeprune compresses"),
    "z-control": ({"control_layers.0.adaLN_modulation.0.weight": (4,)}, "a ControlNet"),
    "wan": ({"blocks.0.self_attn.q.weight": (4,)}, "such as Wan"),
    "fill": (FLUX | {"img_in.weight": (3072, 384)}, "FLUX.1 Fill, which takes more than a prompt"),
    "canny": (FLUX | {"img_in.weight": (3072, 128)}, "FLUX.1 Depth or Canny, which takes more than a prompt"),
    "flux1-dev-kontext": (FLUX, "FLUX.1 Kontext, by its name, which takes more than a prompt"),
    "noise": ({"weight": (4,)}, "tensors of an unknown model; expected a transformer of SD3"),
}  # fmt: skip
BYTES = {
    "empty.safetensors": (b"", "an empty file; download it again"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "a pointer of Git LFS"),
    "page.safetensors": (b"<!doctype html>\n<html><body>Sign in</body></html>", "a web page, not a model"),
    "text.safetensors": (b"Access to model x is restricted.", "a text, not a model"),
    "json.gguf": (b'{"error": "Repository not found", "a": 1}', "a text, not a model"),
    "short.safetensors": (struct.pack("<Q", 10_000) + b'{"a":', "not whole safetensors"),
    "model.ckpt": (b"\x80\x02}q\x00.", "a pickle, which can run code and is never read"),
    "model.safetensors": (b"PK\x03\x04" + bytes(60), "a pickle, which can run code"),
    "zeros.gguf": (b"GGUF\3\0\0\0" + b"\0" * 64, "found no tensors; download it again"),
    "huge.gguf": (b"GGUF\3\0\0\0" + b"\xff" * 64, "not a whole GGUF file"),
    "old.gguf": (b"GGUF\1\0\0\0" + b"\0" * 64, "version 1, expected 2 or 3"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "found a file, expected a folder, or for `edgeprune convert`"),
}


def written(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """Write tensors of these shapes; large ones take no room in the test, since what they hold is not read."""
    import json

    header, at = {}, 0
    for name, shape in shapes.items():
        size = int(torch.tensor(shape).prod()) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)  # sparse
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_named(name: str, tmp_path: Path) -> None:
    shapes, message = OTHERS[name]
    with pytest.raises(InputError, match=message):
        open_file(written(shapes, tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize("name", BYTES)
def test_other_files_are_named(name: str, tmp_path: Path) -> None:
    content, message = BYTES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_file(tmp_path / name)


@pytest.mark.parametrize(
    ("shapes", "name", "what", "config"),
    [
        (FLUX, "flux1-dev", "FLUX.1 dev", "black-forest-labs/FLUX.1-dev"),
        ({n: s for n, s in FLUX.items() if "guidance" not in n}, "x", "FLUX.1 schnell",
         "black-forest-labs/FLUX.1-schnell"),
        (SD35, "sd3.5_large", "Stable Diffusion 3.5 Large", "stabilityai/stable-diffusion-3.5-large"),
        (SD35, "sd3.5_large_Turbo", "Stable Diffusion 3.5 Large Turbo",
         "stabilityai/stable-diffusion-3.5-large-turbo"),
        (Z_IMAGE, "z_image_turbo_bf16", "Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo"),
        (Z_IMAGE, "z_image_bf16", "Z-Image", "Tongyi-MAI/Z-Image"),
        ({"joint_blocks.23.x_block.mlp.fc1.weight": (4,), "joint_blocks.0.x_block.mlp.fc1.weight": (4,),
          "x_embedder.proj.weight": (1536, 16, 2, 2), "pos_embed": (1, 36864, 1536)}, "sd3_medium",
         "Stable Diffusion 3 Medium", "stabilityai/stable-diffusion-3-medium-diffusers"),
    ],
)  # fmt: skip
def test_models_are_told_by_shapes_and_names(
    shapes: dict[str, tuple[int, ...]], name: str, what: str, config: str, tmp_path: Path
) -> None:
    source = open_file(written(shapes, tmp_path / f"{name}.safetensors"))
    assert source.identity.name == what
    assert source.command().endswith(f"-o {name} --config {config}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_to_convert(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(FLUX, tmp_path / "flux1-dev.safetensors")
    before = sorted(tmp_path.rglob("*"))
    error = CliRunner().invoke(app, COMMANDS[command].format(file=file.name, out="out").split()).exception
    assert isinstance(error, EdgepruneError), error
    assert "flux1-dev.safetensors: a transformer of FLUX.1 dev" in str(error)
    expected = "edgeprune convert flux1-dev.safetensors -o flux1-dev --config black-forest-labs/FLUX.1-dev"
    assert expected in str(error) and "\n" not in str(error)
    if command == "convert":
        assert "it does not have configs and tokenizers, text_encoder, text_encoder_2, vae: take them" in str(error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_pickle(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    error = CliRunner().invoke(app, COMMANDS[command].format(file="model.ckpt", out="out").split()).exception
    assert isinstance(error, InputError) and "model.ckpt: a pickle, which can run code" in str(error)


def test_a_folder_of_single_files_names_one(tmp_path: Path) -> None:
    singles.save({"a": torch.ones(2)}, tmp_path / "flux1-dev.safetensors")
    error = CliRunner().invoke(app, ["convert", str(tmp_path), "-o", str(tmp_path / "out")]).exception
    assert isinstance(error, InputError) and f"give a file of it, such as {tmp_path / 'flux1-dev.safetensors'}" in str(
        error
    )
    error = CliRunner().invoke(app, ["compress", str(tmp_path), "-o", str(tmp_path / "out"), "--dry-run"]).exception
    assert isinstance(error, InputError) and "edgeprune convert" in str(error)
