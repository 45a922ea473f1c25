"""Prompts: those of text files, and edgeprune's own captions by what they may be used for. Torch-free."""

from __future__ import annotations

from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.common.texts import lines_of, read_text
from edgeprune.sampling.captions import captions


def prompts(split: Split, count: int | None = None) -> list[str]:
    """Return edgeprune's own captions of a split: the first `count`, which mix all kinds, or all.

    They are for models other than the built-in one, which understands only the captions of shapes world.

    Raises:
        InputError: the split has fewer captions.
    """
    found = [caption.text for caption in captions() if caption.split is split]
    return found if count is None else first(found, count)


def first(texts: list[str], count: int) -> list[str]:
    """Return the first `count` prompts of a split.

    Raises:
        InputError: there are fewer.
    """
    if count > len(texts):
        raise InputError(
            f"prompts: found {count}, expected at most {len(texts)}; give --prompts, a text file, for more"
        )
    return texts[:count]


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line; empty lines do not count.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    try:
        lines = lines_of(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a text file with one prompt per line") from None
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder, expected a text file with one prompt per line") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a list of prompts ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one prompt per line")
    return prompts
