"""Tokenizers with one token for every word of a world's captions: CLIP's and T5's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5TokenizerFast

from edgeprune.shapes import TEMPLATES, Grammar

CLIP_END = "<|endoftext|>"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"


def clip_tokenizer(folder: Path, grammar: Grammar, tokens: int) -> CLIPTokenizer:
    """Return the folder's CLIP tokenizer, whose texts have `tokens` tokens; make it if needed."""
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)
    raw = Tokenizer(models.BPE(unk_token=CLIP_END, end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(_CHARACTERS),
        show_progress=False,
    )
    raw.train_from_iterator(_captions(grammar), trainer)
    model = json.loads(raw.to_str())["model"]
    # Sort the words: the trainer numbers characters differently from run to run. Byte-level CLIP needs each character
    # alone and at a word's end.
    words = sorted(model["vocab"])
    words += [f"{c}</w>" for c in _CHARACTERS if f"{c}</w>" not in model["vocab"]]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", CLIP_END])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)


def t5_tokenizer(folder: Path, grammar: Grammar, tokens: int) -> T5TokenizerFast:
    """Return the folder's T5 tokenizer, whose texts have `tokens` tokens; make it if needed.

    Like T5's own it heeds case. Other words fall apart into characters.
    """
    if not (folder / "tokenizer.json").exists():
        words = sorted({word.strip(",") for text in _captions(grammar) for word in text.split()})
        scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
        characters = ["▁", *_CHARACTERS, *_CHARACTERS[:26].upper()]
        scored += [(c, -9.0) for c in characters]
        raw = Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=False))
        # Metaspace's defaults put a `▁` before each word.
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        raw.decoder = decoders.Metaspace()
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
        folder.mkdir(parents=True, exist_ok=True)
        raw.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=tokens)


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Return token ids padded to the tokenizer's length, as pipelines do: (B, M)."""
    length = tokenizer.model_max_length
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def _captions(grammar: Grammar) -> list[str]:
    return [template.format(prompt.text) for prompt in grammar.prompts() for template in TEMPLATES]
