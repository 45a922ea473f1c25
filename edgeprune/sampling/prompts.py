"""Prompts in text files, and the list that comes with edgeprune for models other than the built-in one. Torch-free."""

from __future__ import annotations

from pathlib import Path

from edgeprune.common.errors import InputError

PROMPTS = Path(__file__).parent / "prompts.txt"
"""Used where the user names no prompts."""


def read_prompts(path: Path) -> list[str]:
    """Lines of a text file that are not empty.

    Raises:
        InputError: not readable, or no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a list of prompts ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts, expected one a line")
    return prompts
