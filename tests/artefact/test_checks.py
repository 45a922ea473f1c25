"""A folder is checked by its configs and file headers before any work: one line names the file, field or tensor."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from edgeprune.artefact.checks import check_pipeline, part_weights
from edgeprune.artefact.loading import check_loaded, load, load_part
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.common.errors import InputError
from edgeprune.families.encoders import CLIP, T5
from edgeprune.families.parts import VAE

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
Tensors = dict[str, torch.Tensor]
CLIP_FILE, T5_FILE = "text_encoder/model.safetensors", "text_encoder_3/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
QUERY = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny SD3 with a T5, and a tiny FLUX."""
    root = tmp_path_factory.mktemp("checks")
    tiny.tiny_pipeline(root / "sd3", t5=True, num_layers=1)
    tiny.tiny_flux_pipeline(root / "flux")
    return {"sd3": root / "sd3", "flux": root / "flux"}


def change(folder: Path, file: str, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, file: str, edit: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of a file."""
    save_file({n: t.contiguous() for n, t in edit(load_file(folder / file)).items()}, folder / file, {"format": "pt"})


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def renamed(**names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {names.get(n, n): t for n, t in tensors.items()}


def scaled_fp8(tensors: Tensors) -> Tensors:
    scaled = {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items() if "SelfAttention" in n}
    return tensors | scaled | {f"{n[:-7]}.scale_weight": torch.tensor(0.1) for n in scaled}


def rounded_with_scale(tensors: Tensors) -> Tensors:
    return tensors | {f"{QUERY}.weight_scale": torch.ones(1)}


def half_of(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name][: len(tensors[name]) // 2]}


TENSORS: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "projection": (CLIP_FILE, without("text_projection.weight"), "text_encoder: text_projection.weight: found no such"),
    "clip": (CLIP_FILE, half_of("text_projection.weight"), r"text_projection.weight': found \(16, 32\), expected \(32"),
    "t5": (T5_FILE, without(f"{QUERY}.weight"), f"text_encoder_3: {QUERY}.weight: found no such tensor"),
    "embedding": (T5_FILE, without("shared.weight"), "text_encoder_3: shared.weight: found no such tensor"),
    "umt5": (
        T5_FILE,
        lambda t: t | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 2)},
        "relative_attention_bias.weight': found .* expected none: T5EncoderModel has no such tensor",
    ),
    "ungated": (T5_FILE, lambda t: {n.replace("wi_0", "wi"): v for n, v in t.items()}, "DenseReluDense.wi.weight"),
    "decoder": (VAE_FILE, without("decoder.conv_in.weight"), "vae: decoder.conv_in.weight: found no such tensor"),
    "encoder": (VAE_FILE, without("encoder.conv_in.bias", "encoder.conv_out.bias"), r"conv_in.bias: .*\(and 1 more\)"),
    "fp8": (T5_FILE, scaled_fp8, "SelfAttention.k.weight': found F8_E4M3, expected F32.*edgeprune convert"),
    "scale": (T5_FILE, rounded_with_scale, "weight_scale': found .* it belongs to quantised weights; give the origina"),
    "absmax": (CLIP_FILE, lambda t: t | {"text_projection.weight.absmax": torch.ones(4)}, "absmax'.*quantised weights"),
    "integers": (VAE_FILE, lambda t: t | {"decoder.conv_in.bias": torch.ones(16, dtype=torch.int32)}, "found I32"),
    "transformer": (
        "transformer/diffusion_pytorch_model.safetensors", lambda t: t | {"ema_step": torch.ones(1)}, "'ema_step': fou",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file, edit, says = TENSORS[name]
    bad = Path(shutil.copytree(folders["sd3"], tmp_path / "bad"))
    rewrite(bad, file, edit)
    with pytest.raises(InputError, match=says):
        check_pipeline(bad)
    with pytest.raises(InputError, match=says):
        load(bad)


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
SETTINGS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "kontext": ("flux", INDEX, {"_class_name": "FluxKontextPipeline"}, "found 'FluxKontextPipeline', expected 'FluxPi"),
    "inpaint": ("flux", INDEX, {"_class_name": "FluxInpaintPipeline"}, "found 'FluxInpaintPipeline'.*more than a prom"),
    "controlnet": ("sd3", INDEX, {"_class_name": "StableDiffusion3ControlNetPipeline"}, "_class_name: found"),
    "tiny-vae": ("sd3", INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "vae: found 'AutoencoderTiny', expected 'Au"),
    "no-vae": ("sd3", INDEX, {"vae": [None, None]}, r"vae: found \[None, None\], expected a library and a class"),
    "clip-kind": ("sd3", INDEX, {"text_encoder": ["transformers", "CLIPTextModel"]}, "expected 'CLIPTextModelWithProj"),
    "umt5": ("flux", INDEX, {"text_encoder_2": ["transformers", "UMT5EncoderModel"]}, "text_encoder_2: found 'UMT5"),
    "tokenizer": ("sd3", INDEX, {"tokenizer_3": [None, None]}, "tokenizer_3: found"),
    "heun": ("sd3", INDEX, {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "of scheduler/scheduler_"),
    **{
        name: ("sd3", SCHEDULER, {"_class_name": name}, f"_class_name: found '{name}', expected one of FlowMatch")
        for name in ("DPMSolverSDEScheduler", "FlowMatchLCMScheduler", "LCMScheduler", "DDIMScheduler")
    },
    "karras": ("sd3", SCHEDULER, {"use_karras_sigmas": "7"}, "use_karras_sigmas: found '7', expected true or false"),
    "stochastic": ("flux", SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling: found True, expected False"),
    "inverted": ("flux", SCHEDULER, {"invert_sigmas": True}, "invert_sigmas: found True, expected False"),
    "shift": ("sd3", SCHEDULER, {"shift": "3"}, "scheduler_config.json: shift: found '3', expected a number"),
    "bitsandbytes": (
        "sd3", "text_encoder_3/config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "text_encoder_3/config.json: quantization_config: found 'bitsandbytes'.*give the original's",
    ),
    "torchao": (
        "flux", "transformer/config.json", {"quantization_config": {"quant_method": "torchao"}},
        "transformer/config.json: quantization_config: found 'torchao'",
    ),
    "quanto": ("flux", "vae/config.json", {"quantization_config": {"quant_method": "quanto"}}, "found 'quanto'"),
    "fill": ("flux", "transformer/config.json", {"in_channels": 192, "out_channels": 32}, "found 192 and 32, expected"),
    "channels": ("sd3", "vae/config.json", {"latent_channels": 4}, "latent_channels: found 4, expected 8 by the trans"),
    "scaling": ("sd3", "vae/config.json", {"scaling_factor": None}, "scaling_factor: found None, expected a number"),
    "shifting": ("sd3", "vae/config.json", {"shift_factor": "0"}, "shift_factor: found '0', expected a number"),
    "alpha": ("sd3", "vae/config.json", {"in_channels": 4}, "vae/config.json: in_channels: found 4, expected 3"),
    "t5-width": ("flux", "transformer/config.json", {"joint_attention_dim": 64}, "joint_attention_dim: found 64, expe"),
    "pooled": ("sd3", "transformer/config.json", {"pooled_projection_dim": 32}, "pooled_projection_dim: found 32, exp"),
    "missing": ("sd3", "transformer/config.json", {"num_layers": None}, "num_layers: found None, expected a whole num"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_a_later_stage_cannot_use_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, file, fields, says = SETTINGS[name]
    bad = Path(shutil.copytree(folders[family], tmp_path / "bad"))
    change(bad, file, **fields)
    with pytest.raises(InputError, match=says) as refused:
        check_pipeline(bad)
    assert "\n" not in str(refused.value) and str(bad) in str(refused.value).replace("transformer/config", f"{bad}/")


def test_good_folders_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    for folder in (*folders.values(), BUILTIN):
        assert check_pipeline(folder)["_class_name"].endswith("Pipeline")
    other = Path(shutil.copytree(folders["sd3"], tmp_path / "other"))
    change(other, "transformer/config.json", foo=1, quantization_config={})
    change(other, "vae/config.json", shift_factor=None, latents_mean=None)
    change(other, SCHEDULER, use_karras_sigmas=False, shift_terminal=0.02, a_later_field=None)
    check_pipeline(other)
    old = {f"{at}.mid_block.attentions.0.{new}": f"{at}.mid_block.attentions.0.{name}" for at in ("encoder", "decoder")
           for name, new in (("query.weight", "to_q.weight"), ("proj_attn.bias", "to_out.0.bias"))}  # fmt: skip
    rewrite(other, VAE_FILE, renamed(**old))
    rewrite(other, CLIP_FILE, lambda t: t | {"text_model.embeddings.position_ids": torch.arange(16)[None]})
    rewrite(other, T5_FILE, lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"].clone()})
    pipe = load(other)
    assert torch.equal(pipe.vae.decoder.mid_block.attentions[0].to_q.weight, load(folders["sd3"]).vae.decoder.mid_block
                       .attentions[0].to_q.weight)  # fmt: skip


def test_it_needs_no_torch() -> None:
    code = "import sys; import edgeprune.artefact.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parts_are_read_by_name_and_compute_what_the_vendors_loaders_load(folders: dict[str, Path]) -> None:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    ids = torch.tensor([[3, 5, 7, 1]])
    networks: list[Any] = [CLIPTextModelWithProjection, T5EncoderModel]
    for kind, network, name in zip((CLIP, T5), networks, ("text_encoder", "text_encoder_3"), strict=True):
        theirs = network.from_pretrained(folders["sd3"] / name, dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.equal(load_part(folders["sd3"] / name, kind)(ids)[0], theirs(ids)[0])
    assert load_part(folders["sd3"] / "vae", VAE, None).dtype == torch.float16
    t5 = load_part(folders["sd3"] / "text_encoder_3", T5)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert load_part(folders["sd3"] / "vae", "AutoencoderTiny") is None


def test_two_embeddings_in_one_file_must_be_equal(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folders["sd3"], tmp_path / "bad"))
    rewrite(bad, T5_FILE, lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"] + 1})
    weights = part_weights(bad / "text_encoder_3", T5)
    assert weights is not None
    with pytest.raises(InputError, match="found other numbers than in"):
        weights["shared.weight"]


def test_what_a_vendor_loaded_is_compared_with_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """For networks without a table."""
    part = Path(shutil.copytree(folders["sd3"] / "vae", tmp_path / "vae"))
    vae = load_part(part, VAE)
    check_loaded(part, vae)
    vae.decoder.conv_in.to("meta")
    with pytest.raises(InputError, match=re.escape("decoder.conv_in.weight: its library loaded no numbers")):
        check_loaded(part, vae)
    rewrite(tmp_path, VAE_FILE, without("decoder.conv_in.bias"))
    with pytest.raises(InputError, match=r"decoder.conv_in.bias': found none, expected \(16,\)"):
        check_loaded(part, load_part(folders["sd3"] / "vae", VAE))


def test_a_vae_without_shift_encodes_and_decodes(folders: dict[str, Path], tmp_path: Path) -> None:
    from edgeprune.sampling.denoising import decode, encode_images

    null, zero = (Path(shutil.copytree(folders["sd3"], tmp_path / name)) for name in ("null", "zero"))
    change(null, "vae/config.json", shift_factor=None)
    change(zero, "vae/config.json", shift_factor=0.0)
    images = torch.randint(0, 255, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    latents = [encode_images(load(folder), images) for folder in (null, zero)]
    assert torch.equal(*latents)
    np.testing.assert_array_equal(decode(load(null), latents[0]), decode(load(zero), latents[0]))
