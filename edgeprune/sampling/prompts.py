"""Prompts: those of text files, and edgeprune's own captions by what they may be used for. Torch-free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.common.texts import lines_of, read_text
from edgeprune.sampling.captions import captions


def prompts(split: Split, count: int | None = None) -> list[str]:
    """Return edgeprune's own captions of a split: the first `count`, which mix all kinds, or all.

    They are for models other than the teachers of shapes world, which understand only the captions of their world.

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


def cut_words(
    encoder: str,
    prompts: Sequence[str],
    count: Callable[[str], int],
    most: int,
    until: Callable[[str], int] | None = None,
) -> str:
    """Return in one line what a text encoder does not read of prompts that are too long; '' if it reads all.

    Args:
        encoder: its name.
        prompts: all prompts; the line is about the longest.
        count: the number of tokens of a text, with those that mark its start and end.
        most: how many tokens the encoder gets.
        until: the number of tokens up to the end of a text, where a chat goes on after it; None for `count`.
    """
    until = until or count
    long = [(tokens, prompt) for prompt in prompts if (tokens := count(prompt)) > most]
    if not long:
        return ""
    tokens, prompt = max(long)
    words = prompt.split()
    kept = bisect_right(range(len(words) + 1), most, key=lambda number: until(" ".join(words[:number]))) - 1
    given = sum(map(bool, prompts))  # guidance adds an empty one
    which = "the prompt" if given == 1 else f"{len(long)} of {given} prompts, the longest"
    where = f"from {words[max(kept, 0)][:40]!r} on" if kept < len(words) else "after its last word"
    return f"{encoder}: {tokens - most} of {tokens} tokens are cut ({which} {where}); it reads {most}"
