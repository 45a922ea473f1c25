"""What `--train` may say. Torch-free, so that a word that is no choice is refused at once."""

from __future__ import annotations

import re

from edgeprune.common.errors import InputError

ALL = "all"
"""Train the weights themselves."""


def rank_of(train: str) -> int | None:
    """Return the rank R of `lora:R`; None for `all`.

    Raises:
        InputError: it is neither.
    """
    if train == ALL:
        return None
    match = re.fullmatch(r"lora:([1-9]\d{0,3})", train)
    if match is None:
        raise InputError(f"--train: found {train!r}, expected all or lora:R, such as lora:64")
    return int(match[1])
