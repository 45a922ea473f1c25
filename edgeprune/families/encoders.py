"""The text encoders of a pipeline folder, read from its model_index.json: CLIPs, T5 and Qwens. Torch-free.

T5 is `text_encoder_3` in SD3 and `text_encoder_2` in FLUX: the class identifies an encoder, not its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json

if TYPE_CHECKING:
    from edgeprune.families.architecture import Encoder

CLIP, CLIP_POOLED, T5 = "CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"
"""Classes in transformers. Pipelines read all hidden states and the projected text of `CLIP`, but only the text before
projection of `CLIP_POOLED`."""
QWEN3 = "Qwen3ForCausalLM"
"""A causal language model, of which pipelines read some hidden states: nothing after the last of these is used."""
QWEN3_HEADLESS = "Qwen3Model"
"""The same without its head, which no pipeline reads: `text_encoders` gives both the name of the whole."""
QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"
"""A language model that sees images, too: of its last state, normed, pipelines read what it says of text alone."""
LANGUAGE = (QWEN3, QWEN2_5_VL)
"""Language models: they get prompts in a chat, and leave padding out."""

_LIBRARIES = ("diffusers", "transformers")
_PART = re.compile(r"(text_encoder|tokenizer)(_\d)?|transformer|vae|scheduler|feature_extractor|image_encoder")
"""Parts that pipelines have. Other entries of model_index.json may be settings."""

KNOWN = (CLIP, CLIP_POOLED, T5, *LANGUAGE)
"""Classes whose tensors families/parts.py lists, and which are read layer by layer."""
LONG = (T5, *LANGUAGE)
"""Classes whose prompts are padded to `max_sequence_length`; those of CLIPs to their tokenizer's own length."""


@dataclass(frozen=True)
class Chat:
    """The chat in which a language model gets a prompt: one message, then the start of an answer."""

    suffix: str
    """After a prompt."""
    tokens: int
    """Of the chat around a prompt that are read, before and after it."""
    thinking: bool | None
    """What a published chat template is told of thoughts before the answer; None if the pipeline writes the chat."""
    prefix: str = "<|im_start|>user\n"
    """Before a prompt."""
    unread: int = 0
    """The first tokens, whose states are not read; `max_sequence_length` does not count them."""

    def around(self, prompt: str) -> str:
        """Return the text that the tokenizer gets for a prompt."""
        return self.prefix + prompt + self.suffix

    @property
    def template(self) -> str:
        """A chat template that does nothing but this, for a vendor's pipeline, which asks its tokenizer for one."""
        return f"{{{{ {self.prefix!r} + messages[0]['content'] + {self.suffix!r} }}}}"


_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
THOUGHTFUL = Chat(_ANSWER, tokens=8, thinking=True)
"""Whether there are thoughts first is left open."""
THOUGHTLESS = Chat(f"{_ANSWER}<think>\n\n</think>\n\n", tokens=12, thinking=False)
"""There are none."""
DESCRIBING = Chat(
    _ANSWER,
    tokens=5,
    thinking=None,
    prefix="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    unread=34,
)
"""An instruction, of which nothing is read, and the prompt, as QwenImagePipeline has them."""


def is_present(index: Mapping[str, Any], name: str) -> bool:
    """Return True if model_index.json names a class for this part."""
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's model_index.json.

    Only classes of diffusers and transformers may be parts: for any other library, diffusers would run code from the
    folder.

    Raises:
        InputError: the file is missing or damaged, or a part is not a folder name with such a class.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    for name, entry in index.items():
        if name.startswith("_") or not (isinstance(entry, (list, dict)) or _PART.fullmatch(name)):
            continue
        fits = isinstance(entry, list) and len(entry) == 2 and re.fullmatch(r"\w+", name, re.ASCII)
        allowed = fits and (entry == [None, None] or (entry[0] in _LIBRARIES and isinstance(entry[1], str)))
        if not allowed or not (entry[1] is None or entry[1].isidentifier()):
            raise InputError(
                f"{path}: {shown(name)}: found {shown(entry)}, expected a class of diffusers or transformers"
            )
    return index


def text_encoders(folder: Path) -> dict[str, str]:
    """Return the class of each text encoder of a pipeline by name, in order.

    Raises:
        InputError: model_index.json is missing or damaged.
    """
    index = read_index(folder)
    names = sorted(name for name in index if name.startswith("text_encoder") and is_present(index, name))
    kinds = {name: str(index[name][-1]) for name in names}
    return {name: QWEN3 if kind == QWEN3_HEADLESS else kind for name, kind in kinds.items()}


def tokenizer_of(encoder: str) -> str:
    """Return the name of an encoder's tokenizer: `tokenizer_3` for `text_encoder_3`."""
    return encoder.replace("text_encoder", "tokenizer")


def check_tokens(folder: Path, encoders: Iterable[Encoder], tokens: int) -> None:
    """Check that `max_sequence_length` leaves T5 room for a word and its end token, and a Qwen for its chat and one.

    Args:
        folder: the pipeline's.
        encoders: its family's.
        tokens: the length.

    Raises:
        InputError: `tokens` is below that, and the folder has such an encoder.
    """
    present = text_encoders(folder)
    for encoder in (each for each in encoders if each.name in present and each.kind in LONG):
        found, least = ("a Qwen", encoder.chat.tokens + 1) if encoder.chat else ("a T5", 2)
        if tokens < least:
            path, more = folder / "generation.json", f"expected {least} or more with {found} encoder"
            raise InputError(f"{path}: max_sequence_length: found {tokens}, {more}")
