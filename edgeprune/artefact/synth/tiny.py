"""Small text encoders, VAE and tokenizers with the real interfaces, for `edgeprune synth --tiny-encoders`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeprune.artefact.loading import quiet
from edgeprune.artefact.synth import tokenizers
from edgeprune.common.files import read_json, write_json
from edgeprune.families import Config, Family
from edgeprune.families.encoders import CLIP, LANGUAGE, LONG, QWEN3, T5, tokenizer_of
from edgeprune.families.parts import VAE_FLUX2, VAE_QWEN_IMAGE
from edgeprune.sampling.generation import Generation

TOKENS = 77
"""Number of text tokens of every prompt."""
_QWEN_WORDS = 1200
"""Tokens of a tiny Qwen: bytes, and pairs of letters, without which its chat would fill a prompt."""
_MORE_TOKENS = 64
"""Number of more text tokens where there is an instruction before a prompt, of which tiny words make many."""


def write_companions(family: Family, config: Config, out: Path, index: Mapping[str, Any]) -> None:
    """Write everything of a pipeline but its transformer, unless it is there.

    Args:
        family: the transformer's.
        config: the transformer's.
        out: the pipeline's folder.
        index: settings in model_index.json besides the names of its parts.
    """
    import diffusers
    import transformers

    if (out / "model_index.json").is_file():
        return
    space, (hidden, pooled) = family.latents(config), family.text_widths(config)
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _vae(family.vae, space.channels),
    }
    clips = sum(encoder.kind == CLIP for encoder in family.encoders)
    for encoder in family.encoders:
        tokenizer = tokenizer_of(encoder.name)
        if encoder.optional:
            parts |= {encoder.name: None, tokenizer: None}
        elif encoder.kind == T5:
            parts |= {encoder.name: _t5(hidden), tokenizer: _t5_tokenizer(out / "tokenizer.tmp")}
        elif encoder.kind in LANGUAGE:
            tokenizers.write_qwen(out / "tokenizer.tmp", words=_QWEN_WORDS)
            words = transformers.Qwen2TokenizerFast.from_pretrained(out / "tokenizer.tmp")
            model = _qwen3(hidden, encoder.states) if encoder.kind == QWEN3 else _qwen2_vl(hidden)
            parts |= {encoder.name: model, tokenizer: words}
        else:
            width = pooled // max(1, clips)
            clip = _clip(encoder.kind, width, min(64, hidden // max(1, clips)))
            parts |= {encoder.name: clip, tokenizer: _clip_tokenizer(out / "tokenizer.tmp")}
    shutil.rmtree(out / "tokenizer.tmp", ignore_errors=True)
    pipeline = getattr(diffusers, family.pipeline)(transformer=None, **parts, **index)
    with quiet():
        pipeline.to(torch.float16).save_pretrained(out)
    sequence = TOKENS if any(e.kind in LONG and not e.optional for e in family.encoders) else 0
    sequence += _MORE_TOKENS if any(e.chat and e.chat.unread for e in family.encoders) else 0
    Generation(num_inference_steps=4, guidance_scale=0.0, height=512, width=512, max_sequence_length=sequence).save(out)
    written = read_json(out / "model_index.json")
    write_json(out / "model_index.json", written | {"transformer": ["diffusers", config["_class_name"]]})


def _vae(kind: str, channels: int) -> Any:
    """Return a VAE of a class; `channels` is that of the latents."""
    import diffusers

    if kind == VAE_QWEN_IMAGE:
        numbers = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
        return diffusers.AutoencoderKLQwenImage(
            base_dim=16, z_dim=channels, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **numbers
        )
    more = {} if kind == VAE_FLUX2 else {"scaling_factor": 1.5, "shift_factor": 0.1}
    return getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32), layers_per_block=1, latent_channels=channels, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, **more,
    )  # fmt: skip


def _clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    words = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"]
    vocab = [*words, *(f"{c}</w>" for c in words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _clip(kind: str, width: int, states: int) -> Any:
    """Return a two-layer CLIP text encoder; `width` is that of the pooled text, `states` that of the hidden states."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=90, hidden_size=width if kind != CLIP else states, intermediate_size=64, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=88, eos_token_id=89,
        pad_token_id=89,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def _t5_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    letters = [(f"▁{c}", -3.0) for c in "abcdefghijklmnopqrstuvwxyz"] + [
        (c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz"
    ]
    raw = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)


def _t5(width: int) -> Any:
    """Return a one-layer T5 encoder; `width` is that of the transformer's text input."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=55, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _qwen3(width: int, states: Sequence[int]) -> Any:
    """Return a Qwen3 with one layer more than is read, which makes its states what transformers returns of a real one.

    Args:
        width: of the transformer's text, which is all states side by side.
        states: the hidden states that are read.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=_QWEN_WORDS, hidden_size=width // len(states), intermediate_size=32,
        num_hidden_layers=max(states) + 1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def _qwen2_vl(width: int) -> Any:
    """Return a one-layer Qwen2.5-VL without layers of vision; `width` is that of the transformer's text."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": _QWEN_WORDS, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [width // 4, 0, 0]},
    }  # fmt: skip
    vision = {"depth": 0, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
