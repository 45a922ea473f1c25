"""Complete random pipelines, small enough to build in a test: a few blocks of width 64, text encoders and a VAE.

Fixed seeds give every call the same weights. Layers near zero would hide errors, so adaLN modulation gets larger ones.
The images are noise.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from edgeprune.artefact.synth import tokenizers
from edgeprune.families import Family, family_of_model
from edgeprune.families.flux2 import Flux2
from edgeprune.families.z_image import ZImage
from edgeprune.quantization.quantize import quantize_part
from edgeprune.residency.stored import StoredTransformer
from edgeprune.sampling.denoising import Conditioning, velocity

TOKENS, TEXT_WIDTH = 16, 32
T5_TOKENS, T5_WIDTH = 160, 96  # more tokens than distances that T5 tells apart, wider than both CLIPs together
GENERATION = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "max_sequence_length": 0}


def tiny_transformer(**overrides: Any) -> SD3Transformer2DModel:
    """Make 3 blocks of width 64 over 8x8x8 latents and 16 text tokens of width 64; `overrides` change the config."""
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 1, "in_channels": 8, "out_channels": 8, "num_layers": 3,
        "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 2 * TEXT_WIDTH,
        "caption_projection_dim": 64, "pooled_projection_dim": 2 * TEXT_WIDTH, "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    }  # fmt: skip
    torch.manual_seed(0)
    return visible(SD3Transformer2DModel(**config | overrides))


def tiny_flux(**overrides: Any) -> FluxTransformer2DModel:
    """Make 2 joint and 3 single blocks of width 64 over the latents and text of `tiny_transformer()`."""
    config: dict[str, Any] = {
        "patch_size": 1, "in_channels": 32, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 2 * TEXT_WIDTH, "pooled_projection_dim": 2 * TEXT_WIDTH,
        "axes_dims_rope": (8, 12, 12), "guidance_embeds": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return visible(FluxTransformer2DModel(**config | overrides))


def visible(transformer: Any) -> Any:
    """Enlarge the gates: near zero they would hide a wrong branch."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "transformer_blocks" in name and "norm" in name and name.endswith("linear.weight"):
                parameter.mul_(4)
    return transformer.eval()


def tiny_flux2(**overrides: Any) -> Flux2Transformer2DModel:
    """Make 2 joint and 3 single blocks of width 64, as `tiny_flux()`."""
    config: dict[str, Any] = {
        "in_channels": 32, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 2 * TEXT_WIDTH, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**config | overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.mul_(4)
    return model.eval()


def tiny_z_image(**overrides: Any) -> ZImageTransformer2DModel:
    """Make 5 blocks of width 64 behind one refiner of each kind, over the latents and text of `tiny_transformer()`."""
    config: dict[str, Any] = {
        "in_channels": 8, "dim": 64, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 2 * TEXT_WIDTH, "axes_dims": (8, 12, 12), "axes_lens": (256, 32, 32),
    }  # fmt: skip
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**config | overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pad_token" in name or "norm" in name:  # zeros and ones would hide a missing one
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
            elif "adaLN_modulation" in name:
                parameter.mul_(4)
    return model.eval()


def tiny_qwen_image(**overrides: Any) -> QwenImageTransformer2DModel:
    """Make 5 blocks of width 64 over the latents and text of `tiny_transformer()`."""
    config: dict[str, Any] = {
        "in_channels": 32, "out_channels": 8, "num_layers": 5, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 2 * TEXT_WIDTH, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**config | overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_mod." in name:
                parameter.mul_(4)
            elif "norm" in name and parameter.ndim == 1 and name.endswith("weight"):  # ones would hide a missing one
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


KINDS: dict[str, Callable[..., Any]] = {
    "sd3": functools.partial(tiny_transformer, num_layers=4),
    "sd3-dual": functools.partial(tiny_transformer, num_layers=4, dual_attention_layers=(0, 1)),
    "flux": tiny_flux,
    "flux-schnell": functools.partial(tiny_flux, guidance_embeds=False),
    "flux2": tiny_flux2,
    "flux2-dev": functools.partial(tiny_flux2, guidance_embeds=True),
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
}
"""A transformer of every kind, for tests that all of them must pass."""
TWINS = ("flux-schnell", "flux2-dev")
"""Kinds that differ from another in the guidance input alone: of a costly test they are the slow variants."""
COSTLY_KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind in TWINS else ()) for kind in KINDS]
"""All kinds, for costly tests."""


def config_of(model: Any) -> dict[str, Any]:
    """Return the contents of a model's config.json."""
    return {"_class_name": type(model).__name__} | {k: v for k, v in model.config.items() if k[0] != "_"}


def tiny_step(**sizes: int) -> tuple[torch.Tensor, Conditioning, torch.Tensor, float]:
    """Return the arguments of `velocity` for any of `KINDS`: `tiny_inputs()` and a guidance scale."""
    inputs = tiny_inputs(**sizes)
    condition = Conditioning(inputs["encoder_hidden_states"], inputs["pooled_projections"])
    return inputs["hidden_states"], condition, inputs["timestep"] / 1000, 3.0


def tiny_velocity(model: Any, **sizes: int) -> torch.Tensor:
    """Evaluate any of `KINDS` once."""
    with torch.no_grad():
        return velocity(model, *tiny_step(**sizes))


def tiny_inputs(*, batch: int = 2, height: int = 8, width: int = 8, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Return seeded inputs of `tiny_transformer()` for one denoising step."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 8, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, 2 * TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, 2 * TEXT_WIDTH, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
    }


def tiny_text_encoder(vocab: int, end: int, *, seed: int = 0, kind: Any = CLIPTextModelWithProjection) -> Any:
    """Make a CLIP of two layers of width 32."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=TEXT_WIDTH, intermediate_size=64, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return kind(config).eval()


def tiny_vae() -> AutoencoderKL:
    """Make a VAE of factor 8 with 8 latent channels, and scale and shift of no real model."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.3, shift_factor=0.1,
    )  # fmt: skip
    return vae.eval()


@functools.cache
def tiny_tokenizer() -> CLIPTokenizer:
    """Train the built-in model's tokenizer: half a second, once per process."""
    from edgeprune.demo.train.words import clip_tokenizer
    from edgeprune.shapes import PLAIN

    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer(Path(folder), PLAIN.grammar, 16)


def tiny_t5(vocab: int, *, layers: int = 2) -> T5EncoderModel:
    """Make a T5 of gated layers, as in T5 1.1, with position biases well above zero."""
    torch.manual_seed(6)
    config = T5Config(
        vocab_size=vocab, d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=layers, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=1)
    return model


@functools.cache
def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Train a Unigram tokenizer with T5's special tokens on the built-in model's prompts."""
    from edgeprune import shapes

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]  # 0, 1 and 2, as in every T5
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator([prompt.text for prompt in shapes.prompts()[:2000]], trainer)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        raw.save(f"{folder}/tokenizer.json")
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)


def tiny_pipeline(folder: Path, *, t5: bool = False, **overrides: Any) -> StableDiffusion3Pipeline:
    """Make an SD3 pipeline and save it to `folder` in half precision, with a generation.json."""
    tokenizer = tiny_tokenizer()
    if t5:
        overrides = {"joint_attention_dim": T5_WIDTH} | overrides
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_transformer(**overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(len(tokenizer), end, seed=3),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(len(tokenizer), end, seed=4),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(len(tiny_t5_tokenizer())) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / "generation.json").write_text(
        json.dumps(GENERATION | ({"max_sequence_length": T5_TOKENS} if t5 else {}), indent=1) + "\n"
    )
    # Back to float32, which now equals the files exactly.
    return pipeline.to(torch.float32)


def tiny_flux_pipeline(folder: Path, **overrides: Any) -> FluxPipeline:
    """Make a FLUX.1 pipeline with its T5 and save it to `folder` in half precision, with a generation.json."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    shifted = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    pipeline = FluxPipeline(
        transformer=tiny_flux(**{"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": TEXT_WIDTH} | overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifted if overrides.get("guidance_embeds", True) else {}),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(len(tokenizer), end, seed=3, kind=CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(len(tiny_t5_tokenizer())),
        tokenizer_2=tiny_t5_tokenizer(),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION | {"max_sequence_length": 24}, indent=1) + "\n")
    return pipeline.to(torch.float32)


QWEN_WIDTH = 32
QWEN_LAYERS = 29
"""Two more than FLUX.2 reads."""


def tiny_qwen3(vocab: int, *, layers: int = QWEN_LAYERS) -> Qwen3ForCausalLM:
    """Make a Qwen3 of width 32 whose four heads share two keys; a head is wider than its share of the width."""
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=QWEN_WIDTH, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms of ones would hide a missing one, and small weights what attention does.
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


@functools.cache
def tiny_qwen_tokenizer() -> Qwen2TokenizerFast:
    """Make a byte-level tokenizer with Qwen's special tokens and chat template, and few merges."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.write_qwen(Path(folder), words=1200)
        return Qwen2TokenizerFast.from_pretrained(folder)


def tiny_vae_flux2(**overrides: Any) -> AutoencoderKLFlux2:
    """Make a VAE of factor 8 with 8 latent channels, whose packed channels have different means and variances."""
    torch.manual_seed(2)
    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 4,
        "sample_size": 64,
    }  # fmt: skip
    vae = AutoencoderKLFlux2(**config | overrides)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 32))
    vae.bn.running_var.copy_(torch.linspace(0.3, 3, 32))
    return vae.eval()


@contextlib.contextmanager
def shallow_klein(states: tuple[int, ...]) -> Iterator[None]:
    """Let the family read these states of a text encoder with two more layers: 27, as published, take minutes to trace.

    Diffusers' pipeline has to be told the same states.
    """
    with pytest.MonkeyPatch.context() as patch:
        encoders = tuple(dataclasses.replace(encoder, states=states) for encoder in Flux2.encoders)
        patch.setattr(Flux2, "encoders", encoders)
        patch.setitem(globals(), "tiny_qwen3", functools.partial(tiny_qwen3, layers=states[-1] + 2))
        yield


def tiny_klein_pipeline(folder: Path, *, distilled: bool = True, **overrides: Any) -> Flux2KleinPipeline:
    """Make a FLUX.2 klein pipeline and save it to `folder` in half precision, with a generation.json."""
    tokenizer = tiny_qwen_tokenizer()
    pipeline = Flux2KleinPipeline(
        transformer=tiny_flux2(**{"joint_attention_dim": 3 * QWEN_WIDTH} | overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_vae_flux2(),
        text_encoder=tiny_qwen3(len(tokenizer)),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    settings = GENERATION | {"max_sequence_length": 40} | ({"guidance_scale": 1.0} if distilled else {})
    (folder / "generation.json").write_text(json.dumps(settings, indent=1) + "\n")
    model = pipeline.to(torch.float32).text_encoder.model
    model.rotary_emb = type(model.rotary_emb)(model.config)  # no file has its speeds, so loading does not round them
    return pipeline


def tiny_z_image_pipeline(folder: Path, *, guided: bool = False, layers: int = 36, **overrides: Any) -> ZImagePipeline:
    """Make a Z-Image pipeline and save it to `folder` in half precision, with a generation.json.

    As the published one, its index names the class of the text encoder without a head, and its files are of the whole.
    """
    tokenizer = tiny_qwen_tokenizer()
    pipeline = ZImagePipeline(
        transformer=tiny_z_image(**{"cap_feat_dim": QWEN_WIDTH} | overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=tiny_qwen3(len(tokenizer), layers=layers),
        tokenizer=tokenizer,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder": ["transformers", "Qwen3Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = GENERATION | {"max_sequence_length": 40, "guidance_scale": 3.0 if guided else 0.0}
    (folder / "generation.json").write_text(json.dumps(settings, indent=1) + "\n")
    model = pipeline.to(torch.float32).text_encoder.model
    model.rotary_emb = type(model.rotary_emb)(model.config)  # no file has its speeds, so loading does not round them
    return pipeline


@contextlib.contextmanager
def shallow_z_image(layers: int = 2) -> Iterator[None]:
    """Let the family read the last but one of all states of so many layers: 36, as published, take minutes to trace."""
    with pytest.MonkeyPatch.context() as patch:
        encoders = (dataclasses.replace(encoder, states=(layers - 1,)) for encoder in ZImage.encoders)
        patch.setattr(ZImage, "encoders", tuple(encoders))
        yield


QWEN_IMAGE_TOKENS = 90
"""With most of the instruction before a prompt, which has more tokens here than are left out."""


def tiny_qwen2_vl(vocab: int) -> Qwen2_5_VLForConditionalGeneration:
    """Make a Qwen2.5-VL of 3 layers of width 32, with a vision tower."""
    torch.manual_seed(8)
    text = {
        "vocab_size": vocab, "hidden_size": QWEN_WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": QWEN_WIDTH}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def tiny_vae_qwen_image() -> AutoencoderKLQwenImage:
    """Make a VAE of videos of factor 8 with 8 latent channels, each with a mean and a deviation of its own."""
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
        latents_mean=[i / 8 - 0.5 for i in range(8)], latents_std=[0.5 + i / 4 for i in range(8)],
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "gamma" in name:  # ones would hide a missing one
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        vae.decoder.conv_out.weight.mul_(6)  # of some contrast
    return vae.eval()


def tiny_qwen_image_pipeline(folder: Path, **overrides: Any) -> QwenImagePipeline:
    """Make a Qwen-Image pipeline and save it to `folder` in half precision, with a generation.json.

    The tokenizer knows few words: of the instruction before a prompt, more tokens are read than of the published one's.
    """
    tokenizer = tiny_qwen_tokenizer()
    shifted = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    pipeline = QwenImagePipeline(
        transformer=tiny_qwen_image(**{"joint_attention_dim": QWEN_WIDTH} | overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifted),
        vae=tiny_vae_qwen_image(),
        text_encoder=tiny_qwen2_vl(len(tokenizer)),
        tokenizer=tokenizer,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    settings = GENERATION | {"max_sequence_length": QWEN_IMAGE_TOKENS}
    (folder / "generation.json").write_text(json.dumps(settings, indent=1) + "\n")
    return pipeline.to(torch.float32)


class _InMemory(dict[str, torch.Tensor]):
    """Stands in for `Weights`, with tensors in memory instead of files."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes by name, as `Weights` does."""
        return {name: tuple(tensor.shape) for name, tensor in self.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self[name].dtype

    def check(self, expected: Any) -> None:
        """Accept: a model's own tensors always fit."""

    def ahead(self, names: Any) -> None:
        """Do nothing: all tensors are in memory."""


def stored(model: torch.nn.Module) -> StoredTransformer:
    """Return a loaded transformer as if its weights were on disk."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = copy.deepcopy(model).to("meta")
    return StoredTransformer(family_of_model(model), empty, _InMemory(state))  # type: ignore[arg-type]


def quantize(family: Family, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """Quantise every part of a loaded model, in place: the blocks in order, then the layers outside them."""
    for block in (*range(len(family.blocks(model))), None):
        quantize_part(family, model, block, **options)
    return model
