"""The text encoders of a folder, loaded for an export, and ten prompts encoded by them.

These prompts try a network in half precision. Random text of unit variance would not do: real encoders give values of
tens to hundreds, which overflow first. One encoder is in memory at a time, and none once the prompts are encoded.

Notation: B prompts, M text tokens, K text width, P pooled width.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import AutoTokenizer

from edgeprune.artefact.resolve import read_config
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.export import loaders, modules
from edgeprune.export.folder import from_pretrained
from edgeprune.families import Encoder
from edgeprune.families.encoders import LANGUAGE, LONG, text_encoders, tokenizer_of
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.generation import Generation, longest_prompt
from edgeprune.sampling.prompts import prompts

PROMPTS = 10
_AT_ONCE = 5
"""Prompts that pass through an encoder together: each pass reads all of T5."""


def most_tokens(artefact: Path, encoder: loaders.Encoder) -> int:
    """Return the largest number of tokens that a text encoder gets."""
    if not isinstance(encoder, modules.TextEncoder):
        name = next(name for name, kind in text_encoders(artefact).items() if kind in LONG)
        return _described(artefact, name).length(Generation.load(artefact).max_sequence_length)
    return int(encoder.config.max_position_embeddings)


def tokens(artefact: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    """Return what a text encoder gets of ten prompts of the calibration split, by input: (B, M) each."""
    # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
    encoder, most = _described(artefact, name), Generation.load(artefact).max_sequence_length
    length, chat = encoder.length(most) if kind in LONG else longest_prompt(artefact), encoder.chat
    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, artefact / tokenizer_of(name), tokenizer=True)
    texts = prompts(Split.CALIBRATION, PROMPTS)
    found = tokenizer(
        [chat.around(prompt) for prompt in texts] if chat else texts,
        padding="max_length", max_length=length, truncation=True, return_tensors="pt",
    )  # fmt: skip
    ids = {"input_ids": found.input_ids}
    return ids | {"attention_mask": found.attention_mask} if kind in LANGUAGE else ids  # the others read padding, too


def _described(artefact: Path, name: str) -> Encoder:
    return next(encoder for encoder in read_config(artefact)[1].encoders if encoder.name == name)


def encoded(artefact: Path, progress: Progress = silent) -> Conditioning:
    """Encode ten prompts in float32; a prompt with larger values comes before one with smaller values.

    Raises:
        InputError: an encoder or a tokenizer cannot be loaded.
    """
    outputs = {}
    for name, kind in text_encoders(artefact).items():
        encoder = loaders.compared_encoder(artefact, name, kind)
        rows = []
        with torch.no_grad():
            inputs = tokens(artefact, name, kind)
            for start in range(0, PROMPTS, _AT_ONCE):
                rows.append(encoder(**{key: value[start : start + _AT_ONCE] for key, value in inputs.items()}))
                progress(f"{name}: prompts encoded", _AT_ONCE * len(rows), PROMPTS)
        values = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
        outputs[name] = dict(zip(encoder.outputs, values, strict=True))
        del encoder, rows, values
        gc.collect()  # before the next one is loaded
    config, family = read_config(artefact)
    hidden, pooled = map(torch.from_numpy, family.join(config, outputs, Generation.load(artefact).max_sequence_length))
    order = hidden.abs().amax((1, 2)).argsort(descending=True)
    return Conditioning(hidden[order], pooled[order])


def largest(text: Conditioning, tokens: int) -> Conditioning:
    """Return of each prompt the `tokens` tokens with the largest values: no model's attention knows their places."""
    places = text.hidden.abs().amax(-1).topk(min(tokens, text.hidden.shape[1])).indices.sort().values
    return Conditioning(text.hidden.take_along_dim(places[..., None], 1), text.pooled)
