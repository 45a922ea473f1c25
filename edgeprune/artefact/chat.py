"""The chat in which a language model gets a prompt, as diffusers' pipelines write it."""

from __future__ import annotations

from typing import Any


def as_chat(tokenizer: Any, prompt: str) -> str:
    """Return the text that a tokenizer of transformers gets for a prompt: one message, then the start of an answer.

    Args:
        tokenizer: with a chat template. One that knows a `thinking` mode leaves it out.
        prompt: the user's.
    """
    chat = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return text
