"""Turns prompts into token ids with the `tokenizers` package alone; pads and truncates as transformers does.

A language model gets a prompt in a chat, whose text around the prompt the export has written beside the tokenizer. A
truncated prompt keeps the end token that the tokenizer's rules add. Prompt weighting is not supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json

CHAT = "chat.json"
"""File in a tokenizer's folder with `prefix` and `suffix`, the text around a prompt."""
_LONGEST = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit


class PromptTokenizer:
    """Tokenizes with a `tokenizer` folder: tokenizer.json (rules), tokenizer_config.json (length, padding token), CHAT.

    Args:
        folder: that folder.
        chat: whether it is a language model's, which gets prompts in the chat of CHAT; of others the file is not read.
        max_length: tokens of every prompt; None takes the folder's own length.

    Raises:
        InputError: a file is missing or damaged, or has no usable length or padding token.
    """

    def __init__(self, folder: Path, *, chat: bool, max_length: int | None = None) -> None:
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        config = read_json(config_path)
        read_json(path)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise InputError(f"{path}: the tokenizers package cannot read it: {error}") from None
        length = config.get("model_max_length") if max_length is None else max_length
        if isinstance(length, bool) or not isinstance(length, int) or not 1 < length < _LONGEST:
            raise InputError(f"{config_path}: model_max_length: found {length!r}, expected an integer above 1")
        self.max_length = length
        token = config.get("pad_token", "<|endoftext|>")
        token = token["content"] if isinstance(token, dict) and "content" in token else token
        pad_id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if pad_id is None:
            raise InputError(f"{config_path}: pad_token: found {token!r}, expected a token of {path.name}")
        self.pad_id, self.pad_token = int(pad_id), str(token)
        around = read_json(folder / CHAT) if chat else {"prefix": "", "suffix": ""}
        self._prefix, self._suffix = (fields.text(around, name, folder / CHAT) for name in ("prefix", "suffix"))
        self._padding: dict[str, Any] = {"length": self.max_length, "pad_id": pad_id, "pad_token": token}
        self._fix_length()

    def _fix_length(self) -> None:
        self._tokenizer.enable_truncation(self.max_length)
        self._tokenizer.enable_padding(**self._padding)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text that is neither padded nor truncated, with its chat."""
        return self._count(self._prefix + text + self._suffix)

    def until(self, text: str) -> int:
        """Return the number of tokens up to the end of a text: without what follows it in a chat."""
        return self._count(self._prefix + text)

    def _count(self, text: str) -> int:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens = len(self._tokenizer.encode(text).ids)
        self._fix_length()
        return tokens

    def __call__(self, prompts: list[str]) -> NDArray[np.int64]:
        """Return token ids (B, max_length)."""
        return self.masked(prompts)["input_ids"]

    def masked(self, prompts: list[str]) -> dict[str, NDArray[np.int64]]:
        """Return `input_ids` and `attention_mask`, 1 at tokens and 0 at padding, (B, max_length) each."""
        found = self._tokenizer.encode_batch([self._prefix + prompt + self._suffix for prompt in prompts])
        ids, mask = ([getattr(each, name) for each in found] for name in ("ids", "attention_mask"))
        return {"input_ids": np.asarray(ids, np.int64), "attention_mask": np.asarray(mask, np.int64)}
