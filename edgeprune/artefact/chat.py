"""The chat in which a language model gets a prompt, as diffusers' pipelines write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError

_MARK = "\u2603 the prompt \u2603"
_PROBES = (
    "",
    " ",
    "\n",
    "a red fox",
    " a \n",
    "{{ x }}",
    "<think>a</think>b",
    "<|im_end|>",
    "<tool_response>a</tool_response>",
)
"""Prompts of which a template might make something else."""


def as_chat(tokenizer: Any, prompt: str) -> str:
    """Return the text that a tokenizer of transformers gets for a prompt: one message, then the start of an answer.

    Args:
        tokenizer: with a chat template. One that knows a `thinking` mode leaves it out.
        prompt: the user's.
    """
    chat = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return text


def frame_of(tokenizer: Any, folder: Path) -> tuple[str, str]:
    """Return the text before and after a prompt in its chat: a device then needs no template.

    Args:
        tokenizer: with a chat template.
        folder: the tokenizer's, for messages.

    Raises:
        InputError: the template does something else with a prompt than writing it between two texts.
    """
    prefix, mark, suffix = as_chat(tokenizer, _MARK).partition(_MARK)
    if not mark or any(as_chat(tokenizer, probe) != prefix + probe + suffix for probe in _PROBES):
        raise InputError(f"{folder}: chat_template: expected one that writes the prompt as it is, between two texts")
    return prefix, suffix
