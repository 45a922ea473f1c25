"""Tokenizers with vocabularies of the published sizes, made by rule: words are cut into pieces of up to three letters.

Ids, special tokens and lengths are those of the published ones; the pieces are not, so a prompt takes more tokens.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.common.files import write_json, write_text

CLIP_WORDS, T5_WORDS, QWEN_WORDS = 49_408, 32_100, 151_669
"""Tokens of the published vocabularies. The tables of T5 (32,128) and Qwen3 (151,936) have a few rows more."""
_LETTERS = string.ascii_lowercase
CLIP_END = "<|endoftext|>"
"""Token with which CLIP ends a text, and CLIP-L pads it."""
_START = "<|startoftext|>"
_EXTRA_IDS = 100
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(23)))
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def write_clip(folder: Path, *, pad: str) -> None:
    """Write CLIP's tokenizer as it is published: `vocab.json` and `merges.txt`. `pad` is its padding token."""
    alphabet = [*_byte_characters(), *(f"{c}</w>" for c in _byte_characters())]
    merges = list(itertools.islice(_clip_merges(), CLIP_WORDS - len(alphabet) - 2))
    words = [*alphabet, *("".join(pair) for pair in merges), _START, CLIP_END]
    _write_words(folder, words, merges)
    special = {"bos_token": _START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": pad}
    _write_config(folder, "CLIPTokenizer", 77, special, do_lower_case=True, add_prefix_space=False, errors="replace")


def write_t5(folder: Path, *, length: int = 512) -> None:
    """Write T5's tokenizer: `tokenizer.json` with a unigram model. Prompts are cut after `length` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = itertools.islice(_t5_pieces(), T5_WORDS - _EXTRA_IDS - 3)
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -8.0 - i / T5_WORDS) for i, p in enumerate(pieces))]
    raw = Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=False))
    # Metaspace's defaults put a `▁` before each word.
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    extra = [f"<extra_id_{i}>" for i in reversed(range(_EXTRA_IDS))]
    raw.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "</s>", "<unk>", *extra)])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", raw.to_str())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {"extra_ids": _EXTRA_IDS, "additional_special_tokens": extra[::-1]}
    _write_config(folder, "T5Tokenizer", length, special, **names)


def write_qwen(folder: Path, *, words: int = QWEN_WORDS) -> None:
    """Write Qwen's tokenizer: byte-level `vocab.json` and `merges.txt`, and the format of a chat; `words` tokens."""
    alphabet = list(_byte_characters())
    merges = list(itertools.islice(_qwen_merges(), words - len(alphabet) - len(_QWEN_SPECIAL)))
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    _write_words(folder, pieces, merges)
    added = {
        str(len(pieces) + i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False,
                              "single_word": False, "special": True}
        for i, token in enumerate(_QWEN_SPECIAL)
    }  # fmt: skip
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    names = {"added_tokens_decoder": added, "chat_template": _QWEN_CHAT, "add_prefix_space": False, "errors": "replace"}
    _write_config(folder, "Qwen2Tokenizer", 131_072, special, **names)


def _byte_characters() -> Iterator[str]:
    """Yield the printable character that byte-level BPE writes for each of the 256 bytes, in its order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, shown)
    yield from (chr(256 + i) for i in range(256 - len(shown)))


def _pairs() -> Iterator[tuple[str, str]]:
    return itertools.product(_LETTERS, _LETTERS)


def _clip_merges() -> Iterator[tuple[str, str]]:
    """Yield pairs whose parts are tokens before: two letters, three, then four; `</w>` ends a word."""
    for a, b in _pairs():
        yield from ((a, b), (a, f"{b}</w>"))
    for (a, b), c in itertools.product(_pairs(), _LETTERS):
        yield from ((a + b, c), (a + b, f"{c}</w>"))
    for (a, b), (c, d) in itertools.product(_pairs(), _pairs()):
        yield a + b, c + d


def _qwen_merges() -> Iterator[tuple[str, str]]:
    """Yield pairs whose parts are tokens before; `Ġ` is the space before a word."""
    yield from _pairs()
    for letter in _LETTERS:
        yield "Ġ", letter
    for a, (b, c) in itertools.product(_LETTERS, _pairs()):
        yield from ((a + b, c), (f"Ġ{a}", b + c))
    for (a, b), (c, d) in itertools.product(_pairs(), _pairs()):
        yield a + b, c + d


def _t5_pieces() -> Iterator[str]:
    """Yield `▁`, single characters, then two and three letters, each also behind the space before a word."""
    yield "▁"
    characters = [c for c in string.printable if not c.isspace()] + [chr(i) for i in range(0xC0, 0x180)]
    yield from characters
    yield from (f"▁{c}" for c in characters)
    for word in (*(a + b for a, b in _pairs()), *(a + b + c for a, b in _pairs() for c in _LETTERS)):
        yield from (f"▁{word}", word)


def _write_words(folder: Path, words: list[str], merges: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


def _write_config(folder: Path, kind: str, length: int, special: dict[str, str], **more: Any) -> None:
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": kind, "model_max_length": length} | more)
