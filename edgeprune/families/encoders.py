"""Which text encoders a pipeline folder has, by its model_index.json: CLIPs and T5, under whatever number. Torch-free.

SD3 has T5 as `text_encoder_3`, FLUX as `text_encoder_2`: what an encoder is, its class says, not its number.
What it leaves out: loading them, and classes other than these three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json

CLIP, CLIP_POOLED, T5 = "CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"
"""Of `CLIP` pipelines read every state and the projected text, of `CLIP_POOLED` the text before its projection."""

_LIBRARIES = ("diffusers", "transformers")

EXPORTED = (CLIP, CLIP_POOLED, T5)
"""What an export can write."""


def is_present(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json names a class for this part."""
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's model_index.json. Its parts are folders beside it, and classes of diffusers and transformers alone:
    of another library, diffusers would import the folder's own code.

    Raises:
        InputError: it is missing or damaged, or a part is something else.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, (list, dict)):
            continue
        fits = isinstance(entry, list) and len(entry) == 2 and re.fullmatch(r"\w+", name, re.ASCII)
        known = fits and (entry == [None, None] or (entry[0] in _LIBRARIES and isinstance(entry[1], str)))
        if not known or not (entry[1] is None or entry[1].isidentifier()):
            raise InputError(
                f"{path}: {shown(name)}: found {shown(entry)}, expected a class of diffusers or transformers"
            )
    return index


def text_encoders(folder: Path) -> dict[str, str]:
    """Class by name of the text encoders that a pipeline has, in their order.

    Raises:
        InputError: model_index.json is missing or damaged.
    """
    index = read_index(folder)
    names = sorted(name for name in index if name.startswith("text_encoder") and is_present(index, name))
    return {name: str(index[name][-1]) for name in names}


def tokenizer_of(encoder: str) -> str:
    """`tokenizer_3` of `text_encoder_3`."""
    return encoder.replace("text_encoder", "tokenizer")


def check_tokens(folder: Path, tokens: int) -> None:
    """Refuse a `max_sequence_length` that leaves T5 no word beside its end token.

    Raises:
        InputError: it is below 2 and the folder has a T5.
    """
    if tokens < 2 and T5 in text_encoders(folder).values():
        raise InputError(
            f"{folder / 'generation.json'}: max_sequence_length: found {tokens}, expected 2 or more with a T5 encoder"
        )
