"""Prompts in text files, and the list that edgeprune uses for models other than the built-in one. Torch-free."""

from __future__ import annotations

from pathlib import Path

from edgeprune.common.errors import InputError

PROMPTS = Path(__file__).parent / "prompts.txt"
"""The prompts to use if the user names none."""


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line; empty lines do not count.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a text file with one prompt per line") from None
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder, expected a text file with one prompt per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of prompts ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one prompt per line")
    return prompts
